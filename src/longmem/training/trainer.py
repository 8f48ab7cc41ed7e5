"""``StreamTrainer``: transformers.Trainer whose batches come one after the other, from a place that is saved.

Trainer's own are the loop, optimiser, accumulation, precision, DDP, callbacks, logging and the choice of the best
model. Changed are the order of the data, FSDP2 layer by layer, and checkpoints. As it is, the trainer pre-trains a
causal language model; ``LongMemTrainer`` adds memory.

A folder is a checkpoint once ``complete.json`` is in it, which is written when all other bytes are on the disk: a crash
leaves the checkpoint before or the one after.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from zipfile import is_zipfile

import numpy as np
import torch
from accelerate.utils import reduce
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from longmem.data.stream import IGNORE, WindowBatch
from longmem.data.tokens import TokenCorpus
from longmem.errors import CheckpointError, ConfigError, first_line
from longmem.files import to_disk, whole
from longmem.memory import MemoryBank
from longmem.progress import Progress
from longmem.training.models import undivided

COMPLETE = "complete.json"
NOT_DIVIDED = "cannot divide a model with a backbone in it; leave it out, and set optim.parallel = 'fsdp' of a recipe"
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


class StreamTrainer(Trainer):
    """See the module.

    Args:
        model: whose parameters with ``requires_grad`` are trained; ``shard`` may have divided it.
        args: as ever; ``max_steps`` must be set.
        stream: gives the batches: ``next``, ``window``, ``epoch``, ``state_dict``, ``load_state_dict``.
        same: what a checkpoint must agree with to be resumed from, by name.
        eval_dataset: text for evaluations.
        eval_tokens: of each evaluation; None reads all of the text.
        processing_class: the tokenizer, saved with the model.
        quiet: no progress on stderr.
        **trainer: further arguments of ``Trainer``.

    Raises:
        ConfigError: arguments that would tear texts out of their order; all of them are listed.
    """

    model: Any
    eval_dataset: Any
    optimizer: Any
    lr_scheduler: Any
    seconds = 0.0
    """Wall time of a run, over all its resumed parts; whoever runs it counts them."""
    saving: ClassVar[dict[str, Any]] = {}
    """Arguments of the model's ``save_pretrained``."""
    bank: MemoryBank | None = None
    """What rows have read before, where there is a memory."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        stream: Any,
        same: Mapping[str, Any],
        eval_dataset: TokenCorpus | None = None,
        eval_tokens: int | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        quiet: bool = False,
        **trainer: Any,
    ) -> None:
        refuse_launch()
        _refuse(args, trainer)
        # the place in the text is ours to restore, and so is what happens between processes
        args.ignore_data_skip, args.use_cache, args.logging_nan_inf_filter = True, True, False
        args.ddp_find_unused_parameters = args.ddp_broadcast_buffers = False
        # without a dataset Trainer takes evaluation for a mistake, but an empty one will do
        super().__init__(model=model, args=args, eval_dataset=eval_dataset or [], **trainer)
        # says that the model has its place and reduces its gradients itself
        self.is_distributed_loading_by_transformers = isinstance(model, FSDPModule)
        # not given to Trainer, which would change the model's settings to the tokenizer's
        self.stream, self.tokenizer, self.quiet = stream, processing_class, quiet or args.process_index > 0
        self.same = {"processes": args.world_size, "rows": args.per_device_train_batch_size, **same}
        self.scores, self.practice, self.eval_tokens = Scores(), Scores(), eval_tokens

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        # what is spread stays so; what is divided or quantised is there already, and quantised weights may not be moved
        there = {weight.device for weight in model.parameters()}
        if there != {device} and getattr(model, "hf_device_map", None) is None:
            super()._move_model_to_device(model, device)

    # batches, in order

    def next_batch(self) -> Any:
        """What ``compute_loss`` gets."""
        return self.stream.next()

    def get_train_dataloader(self) -> Any:
        """The stream, which has no end; as long as the run for whoever asks."""
        return _Batches(self)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # ``compute_loss`` takes to the device what it needs there

    # a step

    def read(self, model: nn.Module, batch: Any, memory: Any = None) -> tuple[Any, Tensor]:
        """The model's output over a batch, and its targets (B, T)."""
        ids, targets = (part.to(self.args.device, non_blocking=True) for part in (batch.ids, batch.targets))
        mask, given = getattr(batch, "mask", None), {} if memory is None else {"memory": memory}
        mask = None if mask is None else mask.to(self.args.device, non_blocking=True)
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **given), targets

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross entropy, in nats, over the targets of all processes."""
        # questions about hidden facts bring a memory of their own
        out, targets = self.read(model, inputs, getattr(inputs, "memory", self.bank))
        losses, counted = token_losses(out.logits, targets), targets != IGNORE
        practice = torch.zeros_like(counted)
        if isinstance(inputs, WindowBatch):
            practice |= inputs.practice.to(self.args.device)[:, None]
        self.scores.add(losses, counted & ~practice)
        self.practice.add(losses, counted & practice)
        count = counted.sum()
        if self.args.world_size > 1:  # DDP takes the mean of the processes' gradients
            count = reduce(count, reduction="sum") / self.args.world_size
        loss = losses.sum() / count.clamp(min=1)
        return (loss, out) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: it would walk over all modules in every step."""
        return 0

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that change, by name; nothing else of the model ever does."""
        model = self.accelerator.unwrap_model(self.model)
        return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]

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
            logs |= self.status()
        self.state.epoch = round(self.stream.epoch, 4)
        super().log(logs, *args, **kwargs)

    def status(self) -> dict[str, Any]:
        """Further numbers of a log record."""
        return {}

    # evaluation

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Loss over windows spread evenly over the validation text, each read on its own."""
        corpus = self.eval_dataset if eval_dataset is None else eval_dataset
        if not corpus:
            return {}
        window = self.stream.window
        fits = max(1, (corpus.num_tokens - 1) // window)
        wanted = min(fits, max(1, (self.eval_tokens or corpus.num_tokens) // window))
        starts = np.unique(np.linspace(0, fits - 1, wanted).astype(np.int64)) * window
        rows = self.args.per_device_eval_batch_size
        batches = (_windows(corpus, some, window) for some in np.split(starts, range(rows, len(starts), rows)))
        loss = self.mean_loss(self.accelerator.unwrap_model(self.model), batches, "validating", len(starts) * window)
        return self.told({f"{metric_key_prefix}_loss": loss})

    @torch.no_grad()
    def mean_loss(
        self, model: Any, batches: Iterable[Any], what: str, tokens: int, memory: MemoryBank | None = None
    ) -> float:
        """Mean loss in nats over batches, of all processes; ``memory`` remembers each batch once it is read."""
        model.eval()
        scores = Scores()
        with Progress(what, tokens, "tokens", quiet=self.quiet) as progress:
            for batch in batches:
                with self.accelerator.autocast():
                    out, targets = self.read(model, batch, memory)
                scores.add(token_losses(out.logits, targets), targets != IGNORE)
                if memory is not None:
                    memory.add(out.kv, documents=batch.documents, offsets=batch.offsets)
                progress.advance(targets.numel())
        return scores.gather(self.args.device).mean

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

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ever; ``True`` takes the newest checkpoint.

        Raises:
            CheckpointError: there is none, or it is of another run.
        """
        if resume_from_checkpoint is True:
            found = list_checkpoints(Path(str(self.args.output_dir)))
            resume_from_checkpoint = str(found[-1] if found else self.args.output_dir)
        if resume_from_checkpoint:
            folder = Path(str(resume_from_checkpoint))
            if not (folder / COMPLETE).is_file():
                raise CheckpointError(f"{folder}: no checkpoint; train without resuming")
            _refuse_damaged(folder)
            self._own = self._read_own(folder)
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
        folder, main = Path(output_dir or str(self.args.output_dir)), self.args.should_save
        model = self.accelerator.unwrap_model(self.model)
        # all processes gather; weights that are tied have both their names
        named = [(n, weight) for n, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad]
        weights: dict[int, Tensor] = {}
        for _, weight in named:
            found = undivided(weight.detach())
            if main:
                weights[id(weight)] = found.cpu()
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            state = {name: weights[id(weight)] for name, weight in named}
            model.save_pretrained(folder, state_dict=state, **self.saving)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(str(folder))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        own = {"stream": self.stream.state_dict(), "same": self.same, "seconds": self.seconds}
        own["bank"] = None if self.bank is None else self.bank.state_dict()
        torch.save(own, Path(output_dir) / self._own_file())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_distributed_loading_by_transformers:
            state = get_optimizer_state_dict(self.model, self.optimizer, options=_FULL)
            if self.args.should_save:
                torch.save(state, Path(output_dir) / "optimizer.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.is_distributed_loading_by_transformers:
            state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
            set_optimizer_state_dict(self.model, self.optimizer.optimizer, state, options=_FULL)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        self.stream.load_state_dict(self._own["stream"])
        self.seconds = self._own["seconds"]
        if self.bank is not None:
            self.bank.load_state_dict(self._own["bank"])

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
        except (KeyError, RuntimeError, SafetensorError) as problem:
            said = f"not the weights of this model ({first_line(problem)})"
            raise CheckpointError(f"{folder}: {said}; delete it to resume from an older checkpoint") from problem

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

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


def _windows(corpus: TokenCorpus, starts: NDArray[np.int64], window: int) -> WindowBatch:
    """The windows (B, T) of a text that begin at these tokens."""
    tokens = torch.from_numpy(np.stack([corpus.ids[at : at + window + 1].astype(np.int64) for at in starts]))
    return WindowBatch(tokens[:, :-1], tokens[:, 1:], torch.zeros(len(starts), dtype=torch.bool))


@dataclass
class _Batches:
    """The batches of a trainer for Trainer's loop; without a length it takes one more step of a finished run."""

    trainer: StreamTrainer

    def __len__(self) -> int:
        return self.trainer.args.max_steps * self.trainer.args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.trainer.next_batch()


def refuse_launch() -> None:
    """Refuse a process that a launcher has told to divide the model, before anything is loaded."""
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}") == "true":
            raise ConfigError(f"launched for {name}: that {NOT_DIVIDED}")


def _refuse(args: TrainingArguments, given: Mapping[str, Any]) -> None:
    """What would tear rows out of their order, or is not done here, one line each."""
    rules = [
        (args.n_gpu > 1, f"one process sees {args.n_gpu} GPUs; start one for each: accelerate launch, or torchrun"),
        (args.fsdp or args.deepspeed, f"fsdp and deepspeed of args {NOT_DIVIDED}"),
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


def _refuse_damaged(folder: Path) -> None:
    """Refuse a checkpoint with a file that is cut short; the reader of safetensors says so itself."""
    problems = [file for file in sorted(folder.glob("*.pt*")) if not is_zipfile(file)]
    state = folder / TRAINER_STATE_NAME
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        problems.append(state)
    if problems:
        raise CheckpointError(f"{problems[0]}: damaged; delete {folder.name} to resume from an older checkpoint")


def complete(folder: Path) -> None:
    """Write ``complete.json`` once all bytes are on the disk."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        to_disk(path)
    with whole(folder / COMPLETE) as part:
        part.write_text("{}\n")
        to_disk(part)
    to_disk(folder)
