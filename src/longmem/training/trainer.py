"""``StreamTrainer``: transformers.Trainer whose batches come one after the other, from a place that is saved.

Trainer's own are the loop, accumulation, precision, DDP, callbacks, logging and the choice of the best model. Changed
are the order of the data, the optimiser of recipes, FSDP2 layer by layer, and checkpoints: complete or absent, with
the place in the text.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from longmem.data.windows import IGNORE
from longmem.errors import CheckpointError, ConfigError, first_line
from longmem.training.checkpoint import list_checkpoints, publish, saved_weights, verify, way_out
from longmem.training.optimiser import build_optimiser, lr_share
from longmem.training.recipe import OptimSection
from longmem.training.sharding import assign, let_go, load_optimiser_part, optimiser_part, shard, undivided, whole


@dataclass
class Scores:
    """Sums of losses (nats) and of the tokens they are over; kept on the device, so that adding never waits."""

    loss: Tensor | float = 0.0
    count: Tensor | float = 0.0

    def add(self, losses: Tensor, counted: Tensor) -> None:
        """Add the losses (B, T) at the tokens ``counted`` (B, T) bool."""
        self.loss = self.loss + (losses.detach() * counted).sum()
        self.count = self.count + counted.sum()

    def gather(self, device: torch.device) -> Scores:
        """The sums of all processes."""
        mine = torch.tensor([float(self.loss), float(self.count)], dtype=torch.float64)
        loss, count = reduce(mine.to(device), reduction="sum").tolist()
        return Scores(loss, count)

    @property
    def mean(self) -> float:
        """Nats per token; NaN over no token."""
        return float(self.loss) / float(self.count) if float(self.count) else float("nan")


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy (B, T) in float32 of logits (B, T, V); 0 where targets (B, T) are -100."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=IGNORE)
    return losses.view_as(targets)


class Clock:
    """Wall time of a run over all its parts, which may be limited; every process reads the main one's."""

    def __init__(self, minutes: float | None = None) -> None:
        self.minutes, self.seconds, self._since = minutes, 0.0, time.monotonic()

    def start(self) -> None:
        """Go on from ``seconds`` now."""
        self._since = time.monotonic()

    def tick(self) -> None:
        """Read the time, in all processes at once."""
        now = time.monotonic()
        self.seconds, self._since = agreed(self.seconds + now - self._since), now

    def done(self) -> float:
        """Share of the minutes that are over."""
        return self.seconds / 60 / self.minutes if self.minutes else 0.0


def agreed(value: Any) -> Any:
    """The main process's value in all processes."""
    return value if PartialState().num_processes == 1 else broadcast_object_list([value])[0]


class StreamTrainer(Trainer):
    """See the module.

    A subclass gives ``self.stream`` (``next``, ``epoch``, ``state_dict``, ``load_state_dict``), ``compute_loss`` and
    ``evaluate``. Another training (distillation, search supervision) is another ``compute_loss``.

    Args:
        model: whose parameters with ``requires_grad`` are trained.
        args: as ever; ``max_steps`` must be set.
        optim: optimiser and schedule of a recipe; None takes those of ``args``.
        clock: of the run; a checkpoint keeps its ``seconds``.
        same: what a checkpoint must agree with to be resumed from, by name.
        tokenizer: saved with the model.
        divided: FSDP2, see ``sharding``.
        placed: the model's parts are where they belong.
        **trainer: further arguments of ``Trainer``.

    Raises:
        ConfigError: arguments that would tear texts out of their order; all of them are listed.
    """

    stream: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        stream: Any,
        optim: OptimSection | None = None,
        clock: Clock | None = None,
        same: Mapping[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        divided: bool = False,
        placed: bool = False,
        **trainer: Any,
    ) -> None:
        if problems := _problems(args, trainer):
            raise ConfigError(problems)
        # the place in the text is ours to restore, and so is what happens between processes
        args.ignore_data_skip, args.use_cache, args.logging_nan_inf_filter = True, True, False
        args.ddp_find_unused_parameters = args.ddp_broadcast_buffers = False
        if divided:
            shard(model, torch.bfloat16 if args.bf16 else None)
        self._placed = divided or placed
        # without a dataset Trainer takes evaluation for a mistake
        trainer.setdefault("eval_dataset", [])
        super().__init__(model=model, args=args, **trainer)
        # says that the model has its place and reduces its gradients itself
        self.is_distributed_loading_by_transformers = divided
        self.stream, self.optim, self.tokenizer, self.divided = stream, optim, tokenizer, divided
        self.same = {"processes": args.world_size, "rows": args.per_device_train_batch_size, **(same or {})}
        self.clock = clock or Clock()
        self.scores, self.practice = Scores(), Scores()
        self.writing: Path | None = None

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self._placed:
            super()._move_model_to_device(model, device)

    # batches, in order

    def next_batch(self) -> Any:
        """What ``compute_loss`` gets."""
        return self.stream.next()

    def get_train_dataloader(self) -> Any:
        """The stream, which has no end; as long as the run for whoever asks."""
        return _Batches(self)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The batches of a step. They say themselves how many targets they have."""
        return [next(epoch_iterator) for _ in range(num_batches)], None

    # a step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward over one batch; ``after_backward`` may write memory."""
        model.train()
        loss: Any = self.compute_loss(model, inputs)
        loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        self.after_backward(inputs)
        return loss.detach()  # type: ignore[no-any-return]

    def after_backward(self, batch: Any) -> None:
        """Nothing."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: it would walk over all modules in every step."""
        return 0

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that change, by name; nothing else of the model ever does."""
        model = self.accelerator.unwrap_model(self.model)
        return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """That of the recipe."""
        if self.optim is None:
            return super().create_optimizer(model)
        if self.optimizer is None:
            self.optimizer = build_optimiser(self.trained(), self.optim)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """That of the recipe: the rate in the middle of each step's slice of the run, so that no step has rate 0."""
        if self.optim is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            optim, self._created_lr_scheduler = self.optim, True
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.create_optimizer(), lambda step: lr_share(optim, self._done(step))
            )
        return self.lr_scheduler

    def _done(self, step: int) -> float:
        assert self.optim is not None
        return self.clock.done() if self.optim.schedule_by == "time" else (step + 0.5) / self.args.max_steps

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return undivided(super()._get_grad_norm(model, grad_norm))  # type: ignore[no-untyped-call]

    def _defer_fsdp_gradient_reduction(self) -> Any:
        # divided gradients are added up reduced: a whole one for every layer may not fit
        return nullcontext()

    # what is said

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The loss is the mean over all targets since the last line; that of practice is told apart."""
        if "loss" in logs:
            text, practice = (each.gather(self.args.device) for each in (self.scores, self.practice))
            self.scores, self.practice = Scores(), Scores()
            # a run that does nothing but practise has no other loss
            logs["loss"] = text.mean if text.count else practice.mean
            if practice.count:
                logs["practice_loss"] = practice.mean
            if isinstance(logs.get("grad_norm"), Tensor):
                logs["grad_norm"] = float(logs["grad_norm"])
            logs |= self.status()
        self.state.epoch = round(self.stream.epoch, 4)
        super().log(logs, *args, **kwargs)

    def status(self) -> dict[str, Any]:
        """Further numbers of a log record."""
        return {}

    def told(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Metrics of an evaluation, after everyone who listens has heard them."""
        model: Any = self.model
        let_go(model)
        model.train()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # checkpoints

    def own_state(self) -> dict[str, Any]:
        """Of this process, beside what Trainer saves."""
        return {"stream": self.stream.state_dict(), "same": self.same, "seconds": self.clock.seconds}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.clock.seconds = state["seconds"]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ever; ``True`` takes the newest checkpoint.

        Raises:
            CheckpointError: there is none, it is damaged, or of another run.
        """
        if resume_from_checkpoint is True:
            found = list_checkpoints(Path(str(self.args.output_dir)))
            if not found:
                raise CheckpointError(f"{self.args.output_dir}: no checkpoint; train without resuming")
            resume_from_checkpoint = str(found[-1])
        if resume_from_checkpoint:
            verify(Path(str(resume_from_checkpoint)))
            self._own = self._read_own(Path(str(resume_from_checkpoint)))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.writing or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Written under another name, made durable and renamed: a crash leaves the one before or the one after."""
        run, main = Path(str(self.args.output_dir)), self.args.should_save
        final = run / f"checkpoint-{self.state.global_step}"
        self.writing = run / ".writing"
        if main:
            shutil.rmtree(self.writing, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(run / f"checkpoint-{self.state.best_global_step}")
            if main:
                self.state.save_to_json(str(self.writing / final.name / "trainer_state.json"))
                publish(self.writing / final.name, final)
                rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint)
                shutil.rmtree(self.writing, ignore_errors=True)
        finally:
            self.writing = None
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        weights = whole(self.trained(), keep=self.args.should_save)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self.save_weights(folder, weights)
            tokenizer = self.tokenizer or self.processing_class
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))

    def save_weights(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """The model, with these undivided weights."""
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=weights)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        part = self.own_state() | ({"optimiser": optimiser_part(self.create_optimizer())} if self.divided else {})
        torch.save(part, Path(output_dir) / self._own_file())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.divided and self.args.should_save:  # every process writes its own part
            (Path(output_dir) / "optimizer.pt").unlink()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.divided:
            load_optimiser_part(self.create_optimizer(), self._own["optimiser"])
            scheduler: Any = self.lr_scheduler
            scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        self.load_own_state(self._own)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        try:
            assign(self.trained(), saved_weights(folder))
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as problem:
            raise CheckpointError(
                f"{folder}: weights of another model ({first_line(problem)}); {way_out(folder)}"
            ) from problem

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _init_training_state(self, max_steps: int, *args: Any) -> Any:
        # how often to log, measure and save is what the arguments say now, not what they said before
        found = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return found

    def _read_own(self, folder: Path) -> dict[str, Any]:
        file = folder / self._own_file()
        if not file.is_file():
            written = len(list(folder.glob("rank-*-of-*.pt")))
            raise CheckpointError(
                f"{folder}: written by {written} processes, there are {self.args.world_size}; start as many, each "
                "keeps the memory of its rows"
            )
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        before = state["same"]
        changed = [
            f"{name} was {before.get(name)!r}, is {value!r}" for name, value in self.same.items()
            if before.get(name) != value
        ]  # fmt: skip
        if changed:
            raise CheckpointError(f"{folder}: of another run: {'; '.join(changed)}; undo that, or train anew")
        return state

    def _own_file(self) -> str:
        return f"rank-{self.args.process_index}-of-{self.args.world_size}.pt"


class _Batches:
    """The batches of a trainer for Trainer's loop."""

    def __init__(self, trainer: StreamTrainer) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        return self._trainer.args.max_steps * self._trainer.args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self._trainer.next_batch()


def _problems(args: TrainingArguments, trainer: Mapping[str, Any]) -> list[str]:
    """What would tear rows out of their order, or is not done here, one line each."""
    found = []
    if args.max_steps <= 0:
        found.append("max_steps is not set; a stream of texts has no end by itself")
    if args.n_gpu > 1:
        found.append(
            f"one process sees {args.n_gpu} GPUs and would copy the model to each in every step; start a process for "
            "each: accelerate launch, or torchrun"
        )
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        found.append("args.fsdp gives all layers one dtype; use `longmem train` with optim.parallel = 'fsdp'")
    if args.deepspeed:
        found.append("deepspeed knows nothing of a model inside of another; use DDP, or `longmem train` for FSDP2")
    if args.auto_find_batch_size:
        found.append("auto_find_batch_size would change the rows, and so whose memory is whose; set it to False")
    for name in ("model_init", "compute_loss_func", "compute_metrics", "data_collator"):
        if trainer.get(name) is not None:
            found.append(f"{name} is not taken here; override compute_loss or evaluate")
    return found
