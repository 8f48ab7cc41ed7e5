"""``train(recipe)``: a run from its recipe to the finished model, or to a signal."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from longmem.data.text import read_documents
from longmem.data.tokenizer import check_tokenizer, load_tokenizer, train_tokenizer
from longmem.data.tokens import TokenCorpus, tokenize
from longmem.data.windows import WindowSampler
from longmem.errors import CheckpointError, ConfigError
from longmem.training.adapt import LongMemTrainer
from longmem.training.checkpoint import list_checkpoints
from longmem.training.log import RunLog
from longmem.training.models import build_model, runs_bf16, storage_dtype
from longmem.training.needles import NeedleTrainer
from longmem.training.pretrain import Pretrainer
from longmem.training.recipe import Recipe
from longmem.training.sharding import wants_sharding
from longmem.training.trainer import Clock, StreamTrainer, agreed

log = logging.getLogger(__name__)
SAME_TO_RESUME = ("data", "model", "backbone", "sidenet", "needles")


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
    if recipe.optim.threads:
        torch.set_num_threads(recipe.optim.threads)
    divided = wants_sharding(recipe.optim.parallel)
    # the division is ours, see `sharding`
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    state = PartialState(cpu=not torch.accelerator.is_available())
    checkpoints = recipe.out_dir / "checkpoints"
    _refuse_old(checkpoints)
    resume = resume and bool(list_checkpoints(checkpoints))
    if not resume and state.is_main_process:
        _clear(recipe, checkpoints, overwrite)
    state.wait_for_everyone()
    set_seed(recipe.run.seed)
    clock = Clock(recipe.optim.max_minutes)
    trainer = build_trainer(recipe, state, clock, divided=divided and state.num_processes > 1, quiet=quiet)
    steps = recipe.optim.accumulate * trainer.tokens_per_batch * state.num_processes
    with (
        _Signals() as signals,
        RunLog(recipe, steps, resume=resume, main=state.is_main_process, quiet=quiet, clock=clock) as told,
    ):
        told.say(_about(trainer, recipe))
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        for each in (_Ends(recipe, trainer, signals, clock), told):
            trainer.add_callback(each)
        if recipe.eval.patience:
            trainer.add_callback(EarlyStoppingCallback(recipe.eval.patience))
        trainer.train(resume_from_checkpoint=resume or None)
        finished = not signals.stopped
        model_dir = recipe.out_dir / "final" if finished else None
        if model_dir is not None:
            trainer.save_model(str(model_dir))
        state.wait_for_everyone()
        step = trainer.state.global_step
        took = f"{step:,} steps, {step * steps:,} tokens, {told.took()}"
        told.say(f"finished: {took}; model in {model_dir}" if finished else
                 f"stopped by a signal: {took}; checkpoint saved, go on with --resume")  # fmt: skip
    return TrainResult(
        recipe.out_dir, model_dir, step, step * steps, clock.seconds, told.losses, told.evaluation,
        state.is_main_process,
    )  # fmt: skip


def build_trainer(
    recipe: Recipe, state: PartialState, clock: Clock, *, divided: bool = False, quiet: bool = False
) -> Any:
    """Tokenizer, token cache, model and trainer of a recipe; the main process makes what others then read."""
    with state.main_process_first():
        tokenizer = _tokenizer(recipe, state.is_main_process)
        texts = tokenize(recipe.train_source(), tokenizer, recipe.cache_dir)
        source = recipe.valid_source()
        valid: TokenCorpus | None = tokenize(source, tokenizer, recipe.cache_dir) if source else None
    if recipe.backbone.device_map is not None and state.num_processes > 1:
        raise ConfigError(
            f"backbone.device_map ({recipe.backbone.device_map!r}) spreads one process over all devices, and there "
            f"are {state.num_processes} processes; start one, or leave it away"
        )
    model: Any = build_model(recipe, tokenizer, state.device)
    check_tokenizer(tokenizer, model, way_out="leave data.tokenizer out, or name the backbone's")
    args = arguments(recipe, state.device)
    data, optim, side = recipe.data, recipe.optim, recipe.sidenet
    now = recipe.model_dump(mode="json", exclude={"data": {"cache_dir"}})
    same = {f"{section}.{name}": value for section in SAME_TO_RESUME for name, value in now[section].items()}
    same |= {"task": recipe.task, "method": recipe.method}
    common: dict[str, Any] = {
        "optim": optim,
        "clock": clock,
        "same": same,
        "tokenizer": tokenizer,
        "divided": divided,
        # what is quantised or spread has been put in its place
        "placed": recipe.backbone.quantised is not None or recipe.backbone.device_map is not None,
        "eval_tokens": recipe.eval.tokens,
        "quiet": quiet or not state.is_main_process,
    }
    if recipe.task == "pretrain":
        sampler = WindowSampler(
            texts, data.window, optim.rows, recipe.run.seed, repeat_fraction=data.repeat_fraction,
            repeat_random=data.repeat_random, rank=state.process_index, world=state.num_processes,
            special_ids=3 if data.tokenizer is None else 0, vocab_size=len(tokenizer),
        )  # fmt: skip
        trainer: Any = Pretrainer(model, args, sampler=sampler, valid=valid, copy=recipe.eval.copy_score, **common)
    else:
        halved = args.bf16 and state.device.type != "cpu"
        if recipe.needles.share:
            common["needles"] = recipe.needles
        trainer = (NeedleTrainer if recipe.needles.share else LongMemTrainer)(
            model,
            args,
            train_dataset=texts,
            eval_dataset=valid,
            window=data.window,
            memory=side.memory,
            memory_size=side.memory_size,
            memory_dtype=storage_dtype(side.memory_dtype) or (torch.bfloat16 if halved else torch.float32),
            shared=side.shared,
            boundary=side.boundary,
            piece_tokens=data.piece_tokens,
            compare=True,
            **common,
        )
    trainer.tokens_per_batch = round(_tokens_per_batch(recipe))
    return trainer


def _tokens_per_batch(recipe: Recipe) -> float:
    """Of needles on average: questions have no fixed length."""
    needles, text = recipe.needles, recipe.optim.rows * recipe.data.window
    return needles.share * 2 * needles.rows * needles.context + (1 - needles.share) * text


def arguments(recipe: Recipe, device: torch.device) -> TrainingArguments:
    """What Trainer is told."""
    optim, evaluation, saving = recipe.optim, recipe.eval, recipe.checkpoint
    step = round(_tokens_per_batch(recipe) * optim.accumulate * PartialState().num_processes)
    # a run by the clock has no number of steps
    steps = optim.steps or (-(-optim.tokens // step) if optim.tokens else 10**9)
    if recipe.log.tensorboard:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(recipe.out_dir / "tensorboard")
    return TrainingArguments(
        str(recipe.out_dir / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=optim.rows,
        per_device_eval_batch_size=evaluation.rows,
        gradient_accumulation_steps=optim.accumulate,
        max_grad_norm=optim.clip,
        bf16=runs_bf16(optim.precision, device),
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
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
    )


class _Ends(TrainerCallback):
    """Ends a run by the clock or a signal, and has its last step logged, measured and saved."""

    def __init__(self, recipe: Recipe, trainer: StreamTrainer, signals: _Signals, clock: Clock) -> None:
        self.recipe, self.trainer, self.signals, self.clock = recipe, trainer, signals, clock
        self.evaluates = recipe.valid_source() is not None or (recipe.task == "pretrain" and recipe.eval.copy_score)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self.clock.tick()
        over = control.should_training_stop or self.clock.done() >= 1
        self.signals.stopped = not over and agreed(self.signals.caught)
        if over or self.signals.stopped:
            control.should_training_stop = control.should_log = control.should_save = True
        if over:
            control.should_evaluate = True
        control.should_evaluate = control.should_evaluate and self.evaluates
        return control


class _Signals:
    """SIGINT and SIGTERM ask for an orderly stop; a second one ends at once."""

    def __init__(self) -> None:
        self.caught = self.stopped = False
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Self:
        with suppress(ValueError):  # not the main thread: signals are someone else's
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.caught = True
        self._restore()


def _about(trainer: StreamTrainer, recipe: Recipe) -> str:
    count = f"{sum(weight.numel() for _, weight in trainer.trained()):,} parameters"
    stream = trainer.stream
    text = f"{stream.corpus.num_tokens:,} tokens of {len(stream.corpus):,} documents"
    if recipe.task == "pretrain":
        return f"pre-training {count} on {text}"
    model: Any = trainer
    layers = ", ".join(map(str, model.longmem.memory_layers))
    memory = f"memory of layer {layers}" if recipe.sidenet.memory else "no memory (control)"
    what = "training a MemTRM" if recipe.method == "memtrm" else "adapting a SideNet"
    needles = recipe.needles
    asked = f"; {needles.share:.0%} of the steps ask {needles.rows} times for {', '.join(needles.kinds)}"
    return f"{what} of {count}, {memory}, on {text}, {len(stream.pieces):,} texts" + asked * bool(needles.share)


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
    earlier = [path for path in (checkpoints, out / "final") if path.is_dir() and any(path.iterdir())]
    if earlier and not overwrite:
        ways = "add --resume to go on, --overwrite to remove it, or set run.name"
        raise ConfigError(f"{out}: holds an earlier run; {ways}")
    for path in (*earlier, out / "tokenizer"):
        shutil.rmtree(path, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)


def _refuse_old(checkpoints: Path) -> None:
    if any(checkpoints.glob("step-*")) and not list_checkpoints(checkpoints):
        raise CheckpointError(
            f"{checkpoints}: checkpoints of an earlier version (tag house-before), which cannot be resumed here; "
            "finish the run with that version, or --overwrite it"
        )
