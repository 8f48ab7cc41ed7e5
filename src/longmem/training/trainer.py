"""``StreamTrainer``: transformers.Trainer whose batches come one after the other, from a place that is saved.

Trainer's own are the loop, accumulation, precision, DDP, callbacks, logging and the choice of the best model. Changed
are the order of the data, the optimiser of recipes, FSDP2 layer by layer, and checkpoints.

A folder is a checkpoint once ``complete.json`` is in it, which is written when all other bytes are on the disk: a crash
leaves the checkpoint before or the one after. Damage is found before anything is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, reduce
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from longmem.data.stream import IGNORE
from longmem.errors import CheckpointError, ConfigError, first_line
from longmem.files import to_disk, whole
from longmem.training.models import build_optimiser, lr_share, shard, undivided
from longmem.training.recipe import OptimSection

COMPLETE = "complete.json"
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


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


def agreed(value: Any) -> Any:
    """The main process's value in all processes."""
    return broadcast_object_list([value])[0]


class StreamTrainer(Trainer):
    """See the module. A subclass gives ``compute_loss`` and ``evaluate``.

    Args:
        model: whose parameters with ``requires_grad`` are trained.
        args: as ever; ``max_steps`` must be set.
        stream: gives the batches: ``next``, ``epoch``, ``state_dict``, ``load_state_dict``.
        optim: optimiser and schedule of a recipe; None takes those of ``args``.
        same: what a checkpoint must agree with to be resumed from, by name.
        tokenizer: saved with the model.
        divided: FSDP2, see ``shard``.
        placed: the model's parts are where they belong.
        **trainer: further arguments of ``Trainer``.

    Raises:
        ConfigError: arguments that would tear texts out of their order; all of them are listed.
    """

    model: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        stream: Any,
        optim: OptimSection | None = None,
        same: Mapping[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        divided: bool = False,
        placed: bool = False,
        **trainer: Any,
    ) -> None:
        _refuse(args, trainer)
        # the place in the text is ours to restore, and so is what happens between processes
        args.ignore_data_skip, args.use_cache, args.logging_nan_inf_filter = True, True, False
        args.ddp_find_unused_parameters = args.ddp_broadcast_buffers = False
        if divided:
            shard(model, torch.bfloat16 if args.bf16 else None)
        self._placed = divided or placed
        # without a dataset Trainer takes evaluation for a mistake
        super().__init__(model=model, args=args, **{"eval_dataset": [], **trainer})
        # says that the model has its place and reduces its gradients itself
        self.is_distributed_loading_by_transformers = divided
        self.stream, self.tokenizer, self.divided = stream, tokenizer, divided
        self.optim: Any = optim
        self.same = {"processes": args.world_size, "rows": args.per_device_train_batch_size, **(same or {})}
        self.scores, self.practice = Scores(), Scores()
        self.seconds, self._since = 0.0, time.monotonic()

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
        """That of the recipe."""
        if self.optim is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self._created_lr_scheduler = True
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.create_optimizer(), self._rate)
        return self.lr_scheduler

    def _rate(self, step: int) -> float:
        """The rate in the middle of a step's slice of the run, so that no step has rate 0."""
        done = self.time_used() if self.optim.by_time else (step + 0.5) / self.args.max_steps
        return lr_share(self.optim, done)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return undivided(super()._get_grad_norm(model, grad_norm))  # type: ignore[no-untyped-call]

    def _defer_fsdp_gradient_reduction(self) -> Any:
        # divided gradients are added up reduced: a whole one for every layer may not fit
        return nullcontext()

    # wall time, over all parts of a run; every process reads the main one's

    def tick(self) -> None:
        """Read the clock, in all processes at once."""
        now = time.monotonic()
        self.seconds, self._since = agreed(self.seconds + now - self._since), now

    def time_used(self) -> float:
        """Share of the recipe's minutes that are over; 0 where there is no such limit."""
        return self.seconds / 60 / self.optim.max_minutes if self.optim and self.optim.max_minutes else 0.0

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
            logs |= self.status()
        self.state.epoch = round(self.stream.epoch, 4)
        super().log(logs, *args, **kwargs)

    def status(self) -> dict[str, Any]:
        """Further numbers of a log record."""
        return {}

    def told(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Metrics of an evaluation, after everyone who listens has heard them."""
        for part in self.model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # a forward without backward leaves units gathered
        self.model.train()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # checkpoints

    def own_state(self) -> dict[str, Any]:
        """Of this process, beside what Trainer saves."""
        return {"stream": self.stream.state_dict(), "same": self.same, "seconds": self.seconds}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``own_state`` gave."""
        self.stream.load_state_dict(state["stream"])
        self.seconds = state["seconds"]

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

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        args, main = self.args, self.args.should_save
        folder = Path(str(args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if main:
            shutil.rmtree(folder, ignore_errors=True)  # what a crash left
        self.accelerator.wait_for_everyone()
        # older ones go once this one is complete
        limit, args.save_total_limit = args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if main:
            complete(folder)
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        weights = ((name, undivided(weight.detach())) for name, weight in self.trained())  # in all processes
        kept = {name: weight.cpu() for name, weight in weights if self.args.should_save}
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self.save_weights(folder, kept)
            if (tokenizer := self.tokenizer or self.processing_class) is not None:
                tokenizer.save_pretrained(str(folder))

    def save_weights(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """The model, with these undivided weights."""
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=weights)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        torch.save(self.own_state(), Path(output_dir) / self._own_file())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.divided:
            state = get_optimizer_state_dict(self.model, self.create_optimizer(), options=_FULL)
            if self.args.should_save:
                torch.save(state, Path(output_dir) / "optimizer.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.divided:
            optimiser: Any = self.create_optimizer()
            state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
            set_optimizer_state_dict(self.model, optimiser.optimizer, state, options=_FULL)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        self.load_own_state(self._own)

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        prefix = getattr(self.accelerator.unwrap_model(self.model), "weights_prefix", "")  # left away in its files
        try:
            saved = {n: value for file in folder.rglob("*.safetensors") for n, value in load_file(file).items()}
            for name, weight in self.trained():
                value = saved[name.removeprefix(prefix)].to(weight.device, weight.dtype)
                if isinstance(weight, DTensor):  # each process takes its own part, nothing is sent
                    value = distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)
                weight.copy_(value)
        except (KeyError, RuntimeError) as problem:
            said = f"weights of another model ({first_line(problem)})"
            raise CheckpointError(f"{folder}: {said}; {way_out(folder)}") from problem

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _init_training_state(self, max_steps: int, *args: Any) -> Any:
        # how often to log, measure and save is what the arguments say now, not what they said before
        found = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        self._since = time.monotonic()
        return found

    def _read_own(self, folder: Path) -> dict[str, Any]:
        if not (file := folder / self._own_file()).is_file():
            written = len(list(folder.glob("rank-*-of-*.pt")))
            raise CheckpointError(
                f"{folder}: written by {written} processes, there are {self.args.world_size}; start as many, each "
                "keeps the memory of its rows"
            )
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        was = state["same"]
        changed = [f"{n} was {was.get(n)!r}, is {now!r}" for n, now in self.same.items() if was.get(n) != now]
        if changed:
            raise CheckpointError(f"{folder}: of another run: {'; '.join(changed)}; undo that, or train anew")
        return state

    def _own_file(self) -> str:
        return f"rank-{self.args.process_index}-of-{self.args.world_size}.pt"


@dataclass
class _Batches:
    """The batches of a trainer for Trainer's loop."""

    trainer: StreamTrainer

    def __len__(self) -> int:
        return self.trainer.args.max_steps * self.trainer.args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.trainer.next_batch()


def _refuse(args: TrainingArguments, given: Mapping[str, Any]) -> None:
    """What would tear rows out of their order, or is not done here, one line each."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    rules = [
        (args.max_steps <= 0, "max_steps is not set; a stream of texts has no end by itself"),
        (args.n_gpu > 1, f"one process sees {args.n_gpu} GPUs; start one for each: accelerate launch, or torchrun"),
        (args.fsdp or launched, "args.fsdp gives all layers one dtype; use `longmem train`, optim.parallel = 'fsdp'"),
        (args.deepspeed, "deepspeed cannot wrap a model inside of another; use DDP, or `longmem train` for FSDP2"),
        (args.auto_find_batch_size, "auto_find_batch_size would change the rows; set it to False"),
    ]
    names = ("model_init", "compute_loss_func", "compute_metrics", "data_collator")
    rules += [(given.get(name), f"{name} is not taken here; override compute_loss or evaluate") for name in names]
    if problems := [problem for broken, problem in rules if broken]:
        raise ConfigError(problems)


# folders of checkpoints


def list_checkpoints(folder: Path) -> list[Path]:
    """Those that are complete, oldest first."""
    found = [file.parent for file in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def complete(folder: Path) -> None:
    """Write ``complete.json``, the SHA-256 of each file, once all bytes are on the disk."""
    inside = sorted(folder.rglob("*"))
    for path in [*inside, folder, folder.parent]:
        to_disk(path)
    with whole(folder / COMPLETE) as part:
        part.write_text(json.dumps({str(p.relative_to(folder)): _hash(p) for p in inside if p.is_file()}, indent=1))
        to_disk(part)
    to_disk(folder)


def verify(folder: Path) -> None:
    """Read a checkpoint through."""
    try:
        hashes = json.loads((folder / COMPLETE).read_text())
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{folder}: {COMPLETE} is missing or damaged; {way_out(folder)}") from problem
    for name, known in hashes.items():
        # earlier versions wrote the size too
        if not (folder / name).is_file() or _hash(folder / name) != (known if isinstance(known, str) else known[1]):
            raise CheckpointError(f"{folder / name}: is not what was written; {way_out(folder)}")


def way_out(folder: Path) -> str:
    """What to do about a checkpoint that is of no use."""
    others = [other.name for other in list_checkpoints(folder.parent) if other != folder]
    return f"delete {folder.name} to resume from {others[-1]}" if others else f"delete {folder.name} to begin anew"


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
