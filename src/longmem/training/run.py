"""``train(recipe)``: a run from its recipe to the finished model, or to a signal."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, set_seed
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from longmem.data.stream import WindowSampler
from longmem.data.text import read_documents
from longmem.data.tokens import check_tokenizer, load_tokenizer, tokenize, train_tokenizer
from longmem.errors import CheckpointError, ConfigError, first_line
from longmem.evaluation.results import perplexity_of
from longmem.modeling.loading import named_dtype
from longmem.progress import Progress, clock
from longmem.training.adapt import LongMemTrainer, NeedleStream
from longmem.training.models import build_model, build_optimiser, half_or_single, lr_share, runs_bf16
from longmem.training.recipe import Recipe
from longmem.training.trainer import StreamTrainer, list_checkpoints, refuse_launch

log = logging.getLogger(__name__)
SAME_TO_RESUME = ("data", "model", "backbone", "sidenet", "needles")
ENDLESS = 10**9
"""Steps of a run by the clock, which has no number of them."""
SHOWN = {
    "loss": "loss {:.3f}", "perplexity": "ppl {:.2f}", "practice_loss": "practice {:.3f}", "lr": "lr {:.2e}",
    "grad_norm": "grad {:.2f}", "tokens_per_second": "{:,.0f} tok/s", "memory_fill": "memory {:.0%}",
}  # fmt: skip
"""What of a log step stands in its line."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    out_dir: Path
    model_dir: Path | None
    """The finished model; None if the run was stopped before its end."""
    step: int
    tokens: int
    seconds: float
    """Wall time, over all resumed parts."""
    losses: list[float]
    """Of each log step of this part, on text only."""
    evaluation: dict[str, Any]
    """The last one."""
    main: bool = True
    """Whether this is the main process, which speaks for all."""


def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False, quiet: bool = False) -> TrainResult:
    """Run a recipe to its end, or to SIGINT or SIGTERM.

    Args:
        resume: go on from the newest checkpoint in the run's folder, if there is one; losses are then those of a run
            that was never interrupted (except with a budget in minutes, which no two machines spend alike).
        overwrite: remove an earlier run in the folder.

    Raises:
        LongMemError: settings, text, backbone or checkpoint are at fault.
    """
    refuse_launch()
    state = PartialState(cpu=not torch.accelerator.is_available())
    again, resume = resume, resume and bool(list_checkpoints(recipe.out_dir / "checkpoints"))
    if not resume and state.is_main_process:
        _clear(recipe.out_dir, overwrite, again)
    state.wait_for_everyone()
    set_seed(recipe.run.seed)
    trainer = build_trainer(recipe, state, quiet=quiet)
    trainer.remove_callback(PrinterCallback)
    if recipe.eval.patience:
        trainer.add_callback(_Patience(recipe.eval.patience))
    silent = quiet or not state.is_main_process
    progress = Progress(f"{recipe.task} {recipe.run.name}", unit="steps", quiet=silent)
    with _signals() as caught, _room(recipe.out_dir), progress:
        progress.say(_about(trainer, recipe))
        run = _Run(recipe, trainer, progress, caught, resume=resume)
        trainer.add_callback(run)
        trainer.train(resume_from_checkpoint=resume or None)
        model_dir = None if run.stopped else recipe.out_dir / "final"
        if model_dir is not None:
            trainer.save_model(str(model_dir))
        state.wait_for_everyone()
        step = trainer.state.global_step
        tokens = step * run.tokens_per_step
        took = f"{step:,} steps, {tokens:,} tokens, {clock(trainer.seconds)}"
        progress.say(f"finished: {took}; model in {model_dir}" if model_dir else
                     f"stopped by a signal: {took}; checkpoint saved, go on with --resume")  # fmt: skip
    history = trainer.state.log_history
    losses = [record["loss"] for record in history if "loss" in record and record["step"] > run.began]
    [last] = [record for record in history if "eval_loss" in record][-1:] or [{}]
    evaluation = {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}
    return TrainResult(
        recipe.out_dir, model_dir, step, tokens, trainer.seconds, losses, evaluation, state.is_main_process
    )


def build_trainer(recipe: Recipe, state: PartialState, *, quiet: bool = False) -> Any:
    """The trainer of a recipe, with all that it needs; the main process makes what the others then read."""
    data, optim, side, backbone = recipe.data, recipe.optim, recipe.sidenet, recipe.backbone
    with state.main_process_first():
        tokenizer = _tokenizer(recipe, state.is_main_process)
        texts = tokenize(recipe.train_source(), tokenizer, recipe.cache_dir)
        source = recipe.valid_source()
        valid = tokenize(source, tokenizer, recipe.cache_dir) if source else None
    if backbone.device_map is not None and state.num_processes > 1:
        raise ConfigError(
            f"backbone.device_map ({backbone.device_map!r}) spreads one process over all devices, and there are "
            f"{state.num_processes} processes; start one, or leave it away"
        )
    model: Any = build_model(recipe, tokenizer, state.device, texts, quiet=quiet)
    check_tokenizer(tokenizer, model, way_out="leave data.tokenizer out, or name the backbone's")
    now = recipe.model_dump(mode="json", exclude={"data": {"cache_dir"}})
    same = {f"{section}.{name}": value for section in SAME_TO_RESUME for name, value in now[section].items()}
    common: dict[str, Any] = {
        "args": _arguments(recipe, state),
        "same": same | {"task": recipe.task, "method": recipe.method},
        "eval_dataset": valid,
        "eval_tokens": recipe.eval.tokens,
        "processing_class": tokenizer,
        "quiet": quiet,
    }
    if recipe.task == "pretrain":
        sampler = WindowSampler(
            texts, data.window, optim.rows, recipe.run.seed, repeat_fraction=data.repeat_fraction,
            repeat_random=data.repeat_random, rank=state.process_index, world=state.num_processes,
            special_ids=3 if data.tokenizer is None else 0, vocab_size=len(tokenizer),
        )  # fmt: skip
        trainer = StreamTrainer(model, stream=sampler, **common)
    else:
        memory_dtype = named_dtype(side.memory_dtype) or half_or_single(recipe, state.device)
        if recipe.needles.kinds:
            common["stream"] = NeedleStream(
                model, texts, tokenizer, recipe.needles, window=data.window, memory_dtype=memory_dtype,
                seed=recipe.run.seed, rank=state.process_index, quiet=quiet or not state.is_main_process,
            )  # fmt: skip
        trainer = LongMemTrainer(
            model, train_dataset=texts, window=data.window, memory=side.memory, memory_size=side.memory_size,
            memory_dtype=memory_dtype, boundary=side.boundary, piece_tokens=data.piece_tokens, **common,
        )  # fmt: skip
    steps = trainer.args.max_steps
    trainer.optimizer = build_optimiser(trainer.trained(), optim)
    # in the middle of a step's slice of the run, so that no step has rate 0
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer,
        lambda step: lr_share(optim, _time_used(trainer, recipe) if steps == ENDLESS else (step + 0.5) / steps),
    )
    return trainer


def _time_used(trainer: StreamTrainer, recipe: Recipe) -> float:
    """Share of the recipe's minutes that are over; 0 where there is no such limit."""
    return trainer.seconds / 60 / recipe.optim.max_minutes if recipe.optim.max_minutes else 0.0


def _tokens_per_step(recipe: Recipe, state: PartialState) -> int:
    """Of all rows and processes; of needles the facts, because questions have no fixed length."""
    needles, optim = recipe.needles, recipe.optim
    of_one = 2 * needles.rows * needles.context if needles.kinds else optim.rows * recipe.data.window
    return of_one * optim.accumulate * int(state.num_processes)


def _arguments(recipe: Recipe, state: PartialState) -> TrainingArguments:
    """What Trainer is told."""
    optim, evaluation, saving = recipe.optim, recipe.eval, recipe.checkpoint
    steps = optim.steps or (-(-optim.tokens // _tokens_per_step(recipe, state)) if optim.tokens else ENDLESS)
    if recipe.log.tensorboard:  # Trainer takes it from there alone
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(recipe.out_dir / "tensorboard")
    return TrainingArguments(
        str(recipe.out_dir / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=optim.rows,
        per_device_eval_batch_size=evaluation.rows,
        gradient_accumulation_steps=optim.accumulate,
        max_grad_norm=optim.clip,
        bf16=runs_bf16(optim.precision, state.device),
        torch_compile=optim.compile,
        seed=recipe.run.seed,
        logging_steps=recipe.log.every,
        eval_strategy="steps" if evaluation.every else "no",
        eval_steps=evaluation.every or None,
        save_strategy="steps" if saving.every else "no",
        save_steps=saving.every or 500,
        save_total_limit=saving.keep_last,
        load_best_model_at_end=evaluation.best,
        metric_for_best_model="loss" if evaluation.best or evaluation.patience else None,
        greater_is_better=False,
        log_level="warning",
        report_to=["tensorboard"] if recipe.log.tensorboard else [],
        use_cpu=state.device.type == "cpu",
        disable_tqdm=True,
    )


class _Patience(EarlyStoppingCallback):
    """Ends a run after so many evaluations without a better one; a resumed run counts on."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        super().on_train_begin(args, state, control, **rest)  # type: ignore[no-untyped-call]
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        vars(self).update(saved)


class _Run(TrainerCallback):
    """Ends a run by the clock or a signal, and tells how it goes.

    Each log step and each evaluation is a record in ``metrics.jsonl``, which the main process writes, and a line on
    stderr; with ``resume`` the records of the steps before are kept.
    """

    def __init__(
        self, recipe: Recipe, trainer: StreamTrainer, progress: Progress, caught: list[int], *, resume: bool
    ) -> None:
        self.recipe, self.trainer, self.progress, self.caught, self.resume = recipe, trainer, progress, caught, resume
        self.path = recipe.out_dir / "metrics.jsonl"
        self.tokens_per_step = _tokens_per_step(recipe, PartialState())
        self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # how often to log, measure and save is what the recipe says now, not what it said before
        state.compute_steps(args, state.max_steps)
        self.began = step = state.global_step
        if state.is_world_process_zero:
            there = self.path.read_text(encoding="utf-8") if self.resume and self.path.exists() else ""
            lines = there.splitlines(keepends=True)
            kept = []
            for line in lines:
                with suppress(ValueError, TypeError, KeyError):  # a line that a crash cut in half
                    if json.loads(line)["step"] <= step and line.endswith("\n"):
                        kept.append(line)
            self.path.write_text("".join(kept), encoding="utf-8")
        if self.resume:
            self.progress.say(f"resumed at step {step:,}, {step * self.tokens_per_step:,} tokens")
        self.progress.total = None if state.max_steps >= ENDLESS else state.max_steps
        self.progress.done = step
        self.since, self.clock = (step, self.trainer.seconds), time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        now = time.monotonic()
        # the main process's clock, and a signal that it got, in all processes
        found = [self.trainer.seconds + now - self.clock, bool(self.caught)]
        (self.trainer.seconds, caught), self.clock = broadcast_object_list(found), now
        over = control.should_training_stop or _time_used(self.trainer, self.recipe) >= 1
        self.stopped = not over and caught
        control.should_training_stop = over
        if over or self.stopped:
            control.should_log = control.should_save = True
        control.should_evaluate = bool(self.trainer.eval_dataset) and (over or control.should_evaluate)
        self.progress.advance()
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # not before: an evaluation that was due would take a signal for the end of the run
        control.should_training_stop |= self.stopped

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        loss, step, seconds, optim = logs["loss"], state.global_step, self.trainer.seconds, self.recipe.optim
        if not math.isfinite(loss) and "practice_loss" not in logs:
            raise ConfigError(
                f"the loss is {loss} at step {step}; lower optim.lr ({optim.lr:g}), lengthen optim.warmup "
                f"({optim.warmup:g}) or set optim.precision = 'fp32'"
            )
        tokens = (step - self.since[0]) * self.tokens_per_step
        speed, self.since = tokens / max(seconds - self.since[1], 1e-9), (step, seconds)
        record = {"seconds": round(seconds, 2), "perplexity": perplexity_of(loss), "tokens_per_second": round(speed, 1)}
        record |= {"lr" if name == "learning_rate" else name: value for name, value in logs.items()}
        self._record("train", state, record)

        parts = [f"step {step:,}" + (f"/{state.max_steps:,}" if state.max_steps < ENDLESS else "")]
        parts += [form.format(record[name]) for name, form in SHOWN.items() if name in record]
        if "share" in record:
            parts.append(f"share {min(record['share']):.2f} to {max(record['share']):.2f}")
        left = seconds / max(step / state.max_steps, _time_used(self.trainer, self.recipe), 1e-9) - seconds
        self.progress.say(" · ".join([*parts, f"{clock(max(0.0, left))} left"]))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **_: Any) -> None:
        found = {name.removeprefix("eval_"): value for name, value in (metrics or {}).items()}
        self._record("eval", state, found)
        losses = (f"{name} {value:.4f} (ppl {perplexity_of(value):.3f})" for name, value in found.items())
        self.progress.say(" · ".join([f"step {state.global_step:,}", "valid", *losses]))

    def _record(self, kind: str, state: Any, record: dict[str, Any]) -> None:
        if state.is_world_process_zero:
            place = {"kind": kind, "step": state.global_step, "tokens": state.global_step * self.tokens_per_step}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(place | record) + "\n")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The SIGINT and SIGTERM that were caught: they ask for an orderly stop; a second one ends at once."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def on_signal(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    with suppress(ValueError):  # not the main thread: signals are someone else's
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, on_signal)
    try:
        yield caught
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def _room(out: Path) -> Iterator[None]:
    """What torch and safetensors make of a full disk, in one line."""
    try:
        yield
    except (RuntimeError, SafetensorError) as problem:
        if isinstance(problem, RuntimeError) and "inline_container" not in str(problem):
            raise
        line = f"{out} cannot be written ({first_line(problem)}); make room, then go on with --resume"
        raise CheckpointError(line) from problem


def _about(trainer: Any, recipe: Recipe) -> str:
    """What is trained, on what."""
    count = f"{sum(weight.numel() for _, weight in trainer.trained()):,} parameters"
    text = f"{trainer.stream.corpus.num_tokens:,} tokens of {len(trainer.stream.corpus):,} documents"
    if recipe.task == "pretrain":
        return f"pre-training {count} on {text}"
    what = "training a MemTRM" if recipe.method == "memtrm" else "adapting a SideNet"
    layers = ", ".join(map(str, trainer.longmem.memory_layers))
    memory = f"memory of layer {layers}" if recipe.sidenet.memory else "no memory (control)"
    return f"{what} of {count}, {memory}, on {text}"


def _tokenizer(recipe: Recipe, main: bool) -> Any:
    """The named tokenizer, the backbone's, or one learned from the training text and kept in the run's folder."""
    named = recipe.data.tokenizer or (recipe.backbone.path if recipe.task == "adapt" else None)
    if named is not None:
        return load_tokenizer(named)
    folder = recipe.out_dir / "tokenizer"
    if main and not folder.exists():
        log.info("learning a tokenizer of %d tokens", recipe.data.vocab_size)
        texts = (document.text for document in read_documents(recipe.train_source()))
        train_tokenizer(texts, recipe.data.vocab_size).save_pretrained(str(folder))
    return load_tokenizer(folder)


def _clear(out: Path, overwrite: bool, resume: bool) -> None:
    """Make the run's folder, without an earlier run in it; with ``resume`` that is one that has saved nothing whole."""
    earlier = [path for path in (out / "checkpoints", out / "final") if path.is_dir() and any(path.iterdir())]
    if earlier and not overwrite and not (resume and not (out / "final").is_dir()):
        way_on = "no checkpoint to go on from; add" if resume else "add --resume to go on,"
        raise ConfigError(f"{out}: holds an earlier run; {way_on} --overwrite to remove it, or set run.name")
    for path in (*earlier, out / "tokenizer"):
        shutil.rmtree(path, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
