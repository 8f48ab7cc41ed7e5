"""The training loop: evaluate, save, stop?, step, log."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import nn

from longmem.data.text import read_documents
from longmem.data.tokenizer import load_tokenizer, train_tokenizer
from longmem.data.tokens import tokenize
from longmem.errors import CheckpointError, ConfigError
from longmem.training.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from longmem.training.logs import RunLog, duration
from longmem.training.optimiser import Optimisers, lr_share
from longmem.training.recipe import Recipe
from longmem.training.sharding import let_go, shard, wants_sharding, whole
from longmem.training.tasks import StepScores, Task, runs_bf16

log = logging.getLogger(__name__)
SAME_TO_RESUME = ("task", "method", "data", "model", "backbone", "sidenet")


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        out_dir: the run's folder.
        model_dir: the finished model; None if the run was stopped before its end.
        step: optimiser steps done.
        tokens: tokens trained on.
        seconds: wall time, over all resumed parts.
        losses: training loss of each log step of this part, text only.
        evaluation: the last evaluation.
        main: whether this is the main process, which speaks for all.
    """

    out_dir: Path
    model_dir: Path | None
    step: int
    tokens: int
    seconds: float
    losses: list[float]
    evaluation: dict[str, Any]
    main: bool = True


@dataclass
class Progress:
    """Counters that a checkpoint keeps."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated: int = -1
    saved: int = -1
    evaluation: dict[str, Any] = field(default_factory=dict)


def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False, quiet: bool = False) -> TrainResult:
    """Run a recipe to its end, or to SIGINT or SIGTERM.

    Args:
        recipe: see ``Recipe.load``.
        resume: go on from the newest checkpoint in the run's folder, if there is one; losses are then those of a run
            that was never interrupted (except with a budget in minutes, which no two machines spend alike).
        overwrite: remove an earlier run in the folder.
        quiet: say nothing on stderr.

    Raises:
        LongMemError: settings, text, backbone or checkpoint are at fault.
    """
    if recipe.optim.threads:
        torch.set_num_threads(recipe.optim.threads)
    accelerator = make_accelerator(recipe)
    checkpoints = recipe.out_dir / "checkpoints"
    resume = resume and bool(list_checkpoints(checkpoints))
    if not resume and accelerator.is_main_process:
        _clear(recipe, checkpoints, overwrite)
    accelerator.wait_for_everyone()
    _seed(recipe.run.seed)
    task = prepare(recipe, accelerator)
    run = _Run(recipe, task, accelerator, checkpoints)
    if resume:
        run.load()
    title = f"{recipe.task} {recipe.run.name}"
    step = run.at.step if resume else None
    main, board = accelerator.is_main_process, recipe.log.tensorboard
    with (
        RunLog(recipe.out_dir, title, resume_step=step, main=main, tensorboard=board, quiet=quiet) as log_to,
        _Signals() as signals,
    ):
        return run.loop(log_to, signals)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """As launched: one process, DDP or FSDP2."""
    # a control has no memory, and so no gradient of its gate: DDP must not wait for it
    control = recipe.task == "adapt" and not recipe.sidenet.memory
    ddp = DistributedDataParallelKwargs(find_unused_parameters=control)
    # every process copies layers of the backbone, so every one must read it
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # autocast is ours (see `_autocast`), so that one line holds for the plain and the wrapped model
    # left to itself, accelerate sees no other process where there is no accelerator
    return Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="no", kwargs_handlers=[ddp])


def prepare(recipe: Recipe, accelerator: Accelerator) -> Task:
    """Tokenizer, token cache and model of a recipe; the main process makes what others then read."""
    with accelerator.main_process_first():
        tokenizer = _tokenizer(recipe, accelerator.is_main_process)
        train_tokens = tokenize(recipe.train_source(), tokenizer, recipe.cache_dir)
        source = recipe.valid_source()
        valid_tokens = tokenize(source, tokenizer, recipe.cache_dir) if source else None
    rank, world = accelerator.process_index, accelerator.num_processes
    divided = wants_sharding(recipe.optim.parallel, accelerator)
    if recipe.task == "pretrain":
        from longmem.training.pretrain import Pretraining

        return Pretraining(
            recipe, tokenizer, train_tokens, valid_tokens, accelerator.device, rank, world, divided=divided
        )
    from longmem.training.adapt import Adaptation
    from longmem.training.needles import NeedleAdaptation

    kind = NeedleAdaptation if recipe.needles.share else Adaptation
    return kind(recipe, tokenizer, train_tokens, valid_tokens, accelerator.device, rank, world, divided=divided)


class _Run:
    """The state of one run and the loop over it."""

    def __init__(self, recipe: Recipe, task: Task, accelerator: Accelerator, checkpoints: Path) -> None:
        self.recipe, self.task, self.accelerator, self.checkpoints = recipe, task, accelerator, checkpoints
        # one process needs no wrapper; DDP and FSDP2 come from `accelerate launch` or torchrun
        self.model: nn.Module = task.model
        self.divided = wants_sharding(recipe.optim.parallel, accelerator)
        if self.divided:
            # it warns of logits that are a view, for whoever would add to them in place; nobody here does
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
            halved = torch.bfloat16 if runs_bf16(recipe.optim.precision, accelerator.device) else None
            self.model = shard(task.model, accelerator, compute_dtype=halved)
        elif accelerator.num_processes > 1:
            self.model = accelerator.prepare_model(task.model)
        self.optimisers = Optimisers(task.trained(), recipe.optim)
        self.at = Progress()
        optim = recipe.optim
        self.tokens_per_step = task.tokens_per_batch * optim.accumulate * accelerator.num_processes
        self.total_steps = optim.steps or (math.ceil(optim.tokens / self.tokens_per_step) if optim.tokens else None)
        self.norm, self.share = torch.zeros(()), 0.0

    def loop(self, log_to: RunLog, signals: _Signals) -> TrainResult:
        recipe, at = self.recipe, self.at
        log_to.say(self.task.describe())
        if at.step:
            log_to.say(f"resumed at step {at.step:,}, {at.tokens:,} tokens")
        self._clock = time.monotonic() - at.seconds
        scores, logged, losses = StepScores(), (at.tokens, at.seconds), []
        self.model.train()
        while True:
            done = self.done()
            finished, stopped = done >= 1, self._agree(signals.caught)
            if self._due(recipe.eval.every, at.evaluated) or (finished and at.evaluated != at.step):
                self._evaluate(log_to, final=finished)
            if self._due(recipe.checkpoint.every, at.saved) or ((finished or stopped) and at.saved != at.step):
                self.save()
            if finished or stopped:
                break

            self.step(scores, done)

            if at.step % recipe.log.every == 0 or self.done() >= 1:
                scores.gather(self.accelerator)
                losses.append((scores.text if float(scores.text.count) else scores.practice).mean)
                self._log(log_to, scores, logged)
                scores, logged = StepScores(), (at.tokens, at.seconds)
            log_to.progress(self.done())
        return self._end(log_to, losses, finished)

    def done(self) -> float:
        """Share of the run that is over: of its steps or its minutes, whichever is further on."""
        optim = self.recipe.optim
        by_steps = self.at.step / self.total_steps if self.total_steps else 0.0
        by_time = self.at.seconds / 60 / optim.max_minutes if optim.max_minutes else 0.0
        return max(by_steps, by_time)

    def step(self, scores: StepScores, done: float) -> None:
        """One optimiser step over ``accumulate`` batches; memory is written after each backward."""
        optim, accelerator = self.recipe.optim, self.accelerator
        for part in range(optim.accumulate):
            last = part == optim.accumulate - 1
            # divided gradients are added up reduced: a whole one for every layer may not fit
            with nullcontext() if last or self.divided else accelerator.no_sync(self.model):
                with self._autocast():
                    loss = self.task.loss(self.model, scores)
                accelerator.backward(loss / optim.accumulate)
            self.task.after_backward()
        self.norm = self.optimisers.clip(optim.clip)
        self.share = self._share()
        self.optimisers.set_share(self.share)
        self.optimisers.step()
        self.at.step += 1
        self.at.tokens += self.tokens_per_step
        self.at.seconds = self._seconds()

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        at, task = self.at, self.task
        at.saved = at.step
        at.seconds = self._seconds()
        main = self.accelerator.is_main_process
        states = self.optimisers.state_dict(keep=main)
        trainer = {"progress": dict(vars(at)), "optimisers": states, "recipe": self._settings()}
        save_checkpoint(
            self.checkpoints,
            at.step,
            weights=whole(task.weights(), keep=main),
            trainer=trainer,
            rank={"task": task.state_dict(), "random": random_state()},
            keep_last=self.recipe.checkpoint.keep_last,
            accelerator=self.accelerator,
        )

    def load(self) -> None:
        """Go back to the newest checkpoint."""
        path = list_checkpoints(self.checkpoints)[-1]
        state = load_checkpoint(path, self.accelerator.process_index, self.accelerator.num_processes)
        self._same_run(path, state.trainer["recipe"])
        self.task.load_weights(state.weights)
        self.optimisers.load_state_dict(state.trainer["optimisers"])
        self.at = Progress(**state.trainer["progress"])
        parts = [part["task"] for part in state.ranks]
        if state.processes == self.accelerator.num_processes:
            self.task.load_state_dict(parts[0])
            set_random_state(state.ranks[0]["random"])
            return
        self.task.load_state_dict(self.task.dealt(parts))
        # nobody's random numbers go on in another number of processes: each draws new ones
        _seed(hash((self.recipe.run.seed, self.at.step, self.accelerator.process_index)) % 2**32)
        log.info("checkpoint of %d processes goes on with %d", state.processes, self.accelerator.num_processes)

    def _share(self) -> float:
        """Share of the peak rate for this step: in the middle of its slice of the run, so that no step has rate 0."""
        optim = self.recipe.optim
        if optim.schedule_by == "tokens" and self.total_steps:
            return lr_share(optim, (self.at.step + 0.5) / self.total_steps)
        assert optim.max_minutes is not None
        return lr_share(optim, self._agree(self.at.seconds / 60 / optim.max_minutes))

    def _evaluate(self, log_to: RunLog, final: bool) -> None:
        at = self.at
        at.evaluated = at.step
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            found = self.task.evaluate(self._autocast(), final)
        if found:
            at.evaluation = found
            log_to.record({"kind": "eval", "step": at.step, "tokens": at.tokens, **found})
            log_to.say(f"step {at.step:,} · valid · " + " · ".join(_shown(n, v) for n, v in found.items()))
        let_go(self.model)
        self.accelerator.wait_for_everyone()
        self.model.train()

    def _log(self, log_to: RunLog, scores: StepScores, since: tuple[int, float]) -> None:
        at = self.at
        # a run that does nothing but practise has no other loss
        loss = (scores.text if float(scores.text.count) else scores.practice).mean
        if not math.isfinite(loss) and float(scores.text.count):
            optim = self.recipe.optim
            raise ConfigError(
                f"the loss is {loss} at step {at.step}; lower optim.lr ({optim.lr:g}), lengthen optim.warmup "
                f"({optim.warmup:g}) or set optim.precision = 'fp32'"
            )
        speed = (at.tokens - since[0]) / max(at.seconds - since[1], 1e-9)
        rate = self.recipe.optim.lr * self.share
        record: dict[str, Any] = {
            "kind": "train",
            "step": at.step,
            "tokens": at.tokens,
            "seconds": round(at.seconds, 2),
            "loss": loss,
            "perplexity": _perplexity(loss),
            "lr": rate,
            "grad_norm": float(self.norm),
            "tokens_per_second": round(speed, 1),
        }
        if float(scores.practice.count):
            record["practice_loss"] = scores.practice.mean
        record |= self.task.status()
        log_to.record(record)
        total = f"/{self.total_steps:,}" if self.total_steps else ""
        left = max(0.0, at.seconds / max(self.done(), 1e-9) - at.seconds)
        extra = [f"practice {record['practice_loss']:.3f}"] if "practice_loss" in record else []
        if "memory_fill" in record:
            shares = record["share"]
            extra += [f"memory {record['memory_fill']:.0%}", f"share {min(shares):.2f} to {max(shares):.2f}"]
        parts = [
            f"step {at.step:,}{total}",
            f"loss {loss:.3f}",
            f"ppl {_perplexity(loss):.2f}",
            *extra,
            f"lr {rate:.2e}",
            f"grad {float(self.norm):.2f}",
            f"{speed:,.0f} tok/s",
            f"{duration(left)} left",
        ]
        log_to.say(" · ".join(parts))

    def _end(self, log_to: RunLog, losses: list[float], finished: bool) -> TrainResult:
        at, final = self.at, self.recipe.out_dir / "final"
        if finished:
            weights = whole(self.task.weights(), keep=self.accelerator.is_main_process)
            if self.accelerator.is_main_process:
                self.task.save(final, weights)
        self.accelerator.wait_for_everyone()
        took = f"{at.step:,} steps, {at.tokens:,} tokens, {duration(at.seconds)}"
        if finished:
            log_to.say(f"finished: {took}; model in {final}")
        else:
            log_to.say(f"stopped by a signal: {took}; checkpoint saved, go on with --resume")
        model_dir = final if finished else None
        return TrainResult(
            self.recipe.out_dir,
            model_dir,
            at.step,
            at.tokens,
            at.seconds,
            losses,
            at.evaluation,
            self.accelerator.is_main_process,
        )

    def _due(self, every: int, last: int) -> bool:
        step = self.at.step
        return every > 0 and step > 0 and step % every == 0 and last != step

    def _seconds(self) -> float:
        """Wall time of the run; every process reads the main one's clock."""
        return float(self._agree(time.monotonic() - self._clock))

    def _agree(self, value: Any) -> Any:
        """The main process's value in all processes."""
        if self.accelerator.num_processes == 1:
            return value
        return broadcast_object_list([value])[0]

    def _autocast(self) -> AbstractContextManager[Any]:
        device = self.accelerator.device
        return torch.autocast(device.type, torch.bfloat16, runs_bf16(self.recipe.optim.precision, device))

    def _settings(self) -> dict[str, Any]:
        return self.recipe.model_dump(mode="json")

    def _same_run(self, path: Path, before: dict[str, Any]) -> None:
        """Refuse to go on with another model or other text; a changed budget or rate is the user's choice."""
        now = self._settings()
        changed = []
        for section in SAME_TO_RESUME:
            new, field = now[section], Recipe.model_fields[section]
            old = before.get(section, field.default)
            if isinstance(old, dict):
                # settings that are younger than the checkpoint were at their defaults
                old = field.default.model_dump(mode="json") | old
                names = [name for name in new if name != "cache_dir" and old.get(name) != new[name]]
                changed += [f"{section}.{name} was {old.get(name)!r}, is {new[name]!r}" for name in names]
            elif old != new:
                changed.append(f"{section} was {old!r}, is {new!r}")
        old, new = before["optim"].get("segments", 1), now["optim"]["segments"]
        if old != new:
            changed.append(f"optim.segments was {old}, is {new}")
        if changed:
            what = "; ".join(changed)
            raise CheckpointError(f"{path}: of another run: {what}; undo that, or choose another run.name")


class _Signals:
    """SIGINT and SIGTERM ask for an orderly stop; a second one ends at once."""

    def __init__(self) -> None:
        self.caught = False
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread: signals are someone else's
                break
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.caught = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _tokenizer(recipe: Recipe, main: bool) -> Any:
    """The named tokenizer, the backbone's, or one learned from the training text and kept in the run's folder."""
    named = recipe.data.tokenizer or (recipe.backbone.path if recipe.task == "adapt" else recipe.model.init)
    if named is not None:
        return load_tokenizer(named)
    folder = recipe.out_dir / "tokenizer"
    if main and not folder.exists():
        log.info("learning a tokenizer of %d tokens", recipe.data.vocab_size)
        texts = (document.text for document in read_documents(recipe.train_source()))
        train_tokenizer(texts, recipe.data.vocab_size, recipe.data.tokenizer_bytes).save_pretrained(str(folder))
    return load_tokenizer(folder)


def _clear(recipe: Recipe, checkpoints: Path, overwrite: bool) -> None:
    """Make the run's folder, without an earlier run in it."""
    out = recipe.out_dir
    earlier = [path for path in (checkpoints, out / "final") if path.exists()]
    if earlier and not overwrite:
        ways = "add --resume to go on, --overwrite to remove it, or set run.name"
        raise ConfigError(f"{out}: holds an earlier run; {ways}")
    for path in (*earlier, out / "tokenizer"):
        shutil.rmtree(path, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)


def _seed(seed: int) -> None:
    from accelerate.utils import set_seed

    set_seed(seed)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss


def _shown(name: str, value: Any) -> str:
    if name.startswith("loss"):
        return f"{name} {value:.4f} (ppl {_perplexity(cast(float, value)):.3f})"
    return f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
