"""``LongMemTrainer``: memory-augmented adaptation for those who live in ``transformers.Trainer``.

What Trainer does stays as it is: optimiser, schedule, precision, logging, callbacks, checkpoints, DDP. Added are texts
read in order, one row each, a bank that every segment reads before and writes after ``backward``, and that bank in
every checkpoint, one file for each process.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainingArguments, default_data_collator

from longmem.data.steps import SegmentSteps, as_corpus
from longmem.data.tokens import TokenCorpus
from longmem.data.windows import IGNORE
from longmem.errors import CheckpointError, ConfigError
from longmem.memory import MemoryBank
from longmem.modeling.longmem import LongMem
from longmem.modeling.weights import INDEX, WEIGHTS, missing_weights, read_weights
from longmem.training.tasks import Scores, token_losses
from longmem.types import AttentionKV

log = logging.getLogger(__name__)

Documents = TokenCorpus | Iterable[Mapping[str, Any]]
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass
class _Arrival:
    """Where the rows of a batch stand in their texts."""

    texts: list[str]
    offsets: list[int]
    starts: Tensor
    mask: Tensor


class LongMemTrainer(Trainer):
    """``transformers.Trainer`` for a ``LongMem``.

    Rows are different texts, ``per_device_train_batch_size`` of them in each process, and move on segment by segment;
    only the SideNet is trained. The loss is the mean over all targets of the optimiser step, over all processes. An
    epoch reads as many tokens as the documents have. For FSDP2, or several segments a step, use ``longmem train``.

    Args:
        model: a ``LongMem``, best with ``side_dtype=torch.float32``.
        args: as ever; ``gradient_accumulation_steps`` is that many consecutive segments of every row.
        train_dataset: a ``TokenCorpus``, or records with ``input_ids``, a whole document each.
        eval_dataset: the same, or a dict of such; every evaluation begins with an empty memory.
        window: T, tokens of a segment.
        memory: False trains the control, a SideNet without memory.
        memory_size: M, tokens that each row remembers; None is the model's.
        memory_dtype: of what is remembered; None is the backbone's.
        boundary: whether a row's memory is kept when its next text begins.
        piece_tokens: longer documents are dealt out in pieces of so many tokens; 0 keeps them whole.
        **trainer: further arguments of ``Trainer``.

    Raises:
        ConfigError: arguments that would tear texts out of their order; all of them are listed.
    """

    def __init__(
        self,
        model: LongMem,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Documents | None = None,
        eval_dataset: Documents | dict[str, Documents] | None = None,
        window: int = 1024,
        memory: bool = True,
        memory_size: int | None = None,
        memory_dtype: torch.dtype | None = None,
        boundary: Literal["keep", "reset"] = "keep",
        piece_tokens: int = 0,
        **trainer: Any,
    ) -> None:
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        problems = _problems(model, args, trainer)
        if problems:
            raise ConfigError(problems)
        self.window, self.boundary, self.piece_tokens = window, boundary, piece_tokens
        self.memory_size = model.config.memory_size if memory_size is None else memory_size
        self.memory_dtype = memory_dtype or model.backbone.model.dtype
        self.reads_memory = memory
        self.bank: MemoryBank | None = None
        self._steps: SegmentSteps | None = None
        self._kv: AttentionKV | None = None
        self._share: Tensor | None = None
        self._scored = Scores()
        # columns are ours, and none of them may go
        args.remove_unused_columns = False
        # without memory the gate takes no part, and DDP would wait for it
        model.sidenet.memory_gate.requires_grad_(memory)
        super().__init__(
            model=model,
            args=args,
            train_dataset=None if train_dataset is None else as_corpus(train_dataset),
            eval_dataset=_corpora(eval_dataset),
            data_collator=trainer.pop("data_collator", default_data_collator),
            **trainer,
        )
        # `compute_loss` divides by the targets of the whole step itself
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._loss_shifts_labels = False

    # texts

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Segments in order; a fresh, empty bank goes with them."""
        corpus: Any = self.train_dataset
        if corpus is None:
            raise ConfigError("training needs train_dataset; give tokenised documents")
        rows = self._train_batch_size
        self.bank = self._new_bank(rows) if self.reads_memory else None
        self._scored = Scores()
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        loader = self._loader(corpus, rows, seed)
        self._steps = cast(SegmentSteps, loader.dataset)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Documents from their beginnings, in their order."""
        mine: Any = self.eval_dataset
        named = mine[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        chosen = mine if named is None else named
        if chosen is None:
            raise ConfigError("evaluation needs eval_dataset; give tokenised documents")
        corpus = as_corpus(chosen)
        # a row more than there are documents would cut one of them in two
        rows = max(1, min(self.args.per_device_eval_batch_size, len(corpus) // self.args.world_size))
        return self._loader(corpus, rows, None)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As for evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def _loader(self, corpus: TokenCorpus, rows: int, seed: int | None) -> DataLoader[Any]:
        tokenizer = self.processing_class
        steps = SegmentSteps(
            corpus,
            self.window,
            rows * self.args.world_size,
            seed,
            piece_tokens=self.piece_tokens if seed is not None else 0,
            pad_id=getattr(tokenizer, "pad_token_id", None) or 0,
        )
        loader: DataLoader[Any] = DataLoader(
            steps,
            batch_size=rows,
            sampler=SequentialSampler(steps),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            drop_last=True,
        )
        # batch number t*W + rank goes to this process: its rows are the same at every step
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    # a step: read, backward, write

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One segment of every row; it is written once gradients are there."""
        inputs, arrival = self._arrived(inputs)
        _turn_over(self.bank, arrival, self.boundary)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._remember(arrival)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross entropy, in nats, over the targets of the whole optimiser step."""
        inputs = dict(inputs)
        targets = inputs.pop("labels")
        out = model(**inputs, memory=self.bank, use_cache=False)
        self._kv = out.kv
        self._share = None if out.share is None else out.share.detach()
        losses, counted = token_losses(out.logits, targets), targets != IGNORE
        self._scored.add(losses, counted)
        if num_items_in_batch is None:
            loss = losses.sum() / counted.sum().clamp(min=1)
        else:
            loss = losses.sum() / torch.as_tensor(num_items_in_batch).to(losses.device).clamp(min=1)
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # DDP takes the mean of the processes' gradients
        return (loss, out) if return_outputs else loss

    # evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """With a bank of its own; the loss is the mean over all targets, exactly."""
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        loader: Any = kwargs.get("dataloader", args[0] if args else None)
        rows = loader.dataset.rows // self.args.world_size
        with self._aside(self._new_bank(rows) if self.reads_memory else None, loader.dataset):
            output: Any = super().evaluation_loop(*args, **kwargs)
            sums = torch.stack([torch.as_tensor(each, dtype=torch.float64) for each in vars(self._scored).values()])
            loss, count = self.accelerator.reduce(sums.to(self.args.device), reduction="sum").tolist()
        output.metrics[f"{prefix}_loss"] = loss / count if count else float("nan")
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """One segment of every row of the evaluation; logits are the only prediction."""
        inputs, arrival = self._arrived(inputs)
        _turn_over(self.bank, arrival, self.boundary)
        every = ("past_key_values", "kv", "retrieved", "share", "explanation", "side_hidden", *(ignore_keys or ()))
        found = super().prediction_step(model, inputs, prediction_loss_only, list(every))
        self._remember(arrival)
        return found

    @contextmanager
    def _aside(self, bank: MemoryBank | None, steps: SegmentSteps | None) -> Iterator[None]:
        """While open, another bank is read and written, for other texts."""
        before = self.bank, self._steps, self._scored, self._share
        self.bank, self._steps, self._scored = bank, steps, Scores()
        try:
            yield
        finally:
            self.bank, self._steps, self._scored, self._share = before

    # what is said

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds how full memory is, and the smallest and largest share that a head gives to it."""
        if "loss" in logs and self.bank is not None:
            logs["memory_fill"] = float(self.bank.tokens.float().mean()) / self.bank.capacity_tokens
            if self._share is not None:
                shares = self._share.float().mean(dim=(0, 2))
                logs |= {"share_min": round(float(shares.min()), 4), "share_max": round(float(shares.max()), 4)}
        super().log(logs, *args, **kwargs)

    # checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ever; ``resume_from_checkpoint=True`` takes the newest checkpoint that is whole.

        Raises:
            CheckpointError: the checkpoint is not whole, or of another number of rows or processes.
        """
        if resume_from_checkpoint is True:
            whole = _whole_checkpoints(Path(str(self.args.output_dir)))
            if not whole:
                raise CheckpointError(f"{self.args.output_dir}: no whole checkpoint; train without resuming")
            resume_from_checkpoint = str(whole[-1])
        if resume_from_checkpoint:
            _check_whole(Path(str(resume_from_checkpoint)), self.args.world_size)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        rank, world = self.args.process_index, self.args.world_size
        final = Path(output_dir) / _bank_file(rank, world)
        partial = final.with_suffix(".partial")
        state = {"step": self.state.global_step, "rows": self._train_batch_size, "settings": self._settings()}
        torch.save({**state, "bank": None if self.bank is None else self.bank.state_dict()}, partial)
        os.replace(partial, final)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / _bank_file(self.args.process_index, self.args.world_size)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError) as problem:
            raise CheckpointError(f"{path}: cannot be read ({problem}); {_way_out(path.parent)}") from problem
        now = {"rows": self._train_batch_size, **self._settings()}
        before = {"rows": state["rows"], **state["settings"]}
        changed = [f"{name} was {before.get(name)}, is {value}" for name, value in now.items() if before[name] != value]
        if changed:
            raise CheckpointError(f"{checkpoint}: of another run: {'; '.join(changed)}; undo that, or train anew")
        if self.bank is not None:
            self.bank.load_state_dict(state["bank"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_sidenet(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_sidenet(Path(str(self.state.best_model_checkpoint)))

    def _load_sidenet(self, folder: Path) -> None:
        model: Any = self.accelerator.unwrap_model(self.model)
        try:
            tensors = read_weights(folder)
        except (OSError, SafetensorError, ValueError) as problem:
            raise CheckpointError(f"{folder / WEIGHTS}: cannot be read ({problem}); {_way_out(folder)}") from problem
        try:
            model.sidenet.load_state_dict(tensors)
        except RuntimeError as problem:
            raise CheckpointError(
                f"{folder / WEIGHTS}: of another SideNet ({str(problem).splitlines()[0]}); resume with the model that "
                "training began with"
            ) from problem

    def _settings(self) -> dict[str, Any]:
        """What the state of a bank and the place in the texts depend on."""
        corpus: Any = self.train_dataset
        return {
            "processes": self.args.world_size,
            "window": self.window,
            "piece_tokens": self.piece_tokens,
            "boundary": self.boundary,
            "memory": self.reads_memory,
            "texts": None if corpus is None else corpus.fingerprint,
        }

    # small helpers

    def _new_bank(self, rows: int) -> MemoryBank:
        model: Any = self.accelerator.unwrap_model(self.model)
        return MemoryBank.for_model(model, rows, self.memory_size, dtype=self.memory_dtype, device=self.args.device)

    def _arrived(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], _Arrival]:
        """The model's inputs, and apart from them where they stand."""
        rest = dict(inputs)
        texts, offsets, starts = (rest.pop(name) for name in ("text", "offset", "starts"))
        assert self._steps is not None
        names = [self._steps.name(number) for number in texts.tolist()]
        return rest, _Arrival(names, offsets.tolist(), starts.cpu(), rest["attention_mask"].bool())

    def _remember(self, arrival: _Arrival) -> None:
        kv, self._kv = self._kv, None
        if self.bank is not None and kv is not None:
            written = AttentionKV(kv.keys, kv.values, arrival.mask)
            self.bank.add(written, documents=arrival.texts, offsets=arrival.offsets)


def _turn_over(bank: MemoryBank | None, arrival: _Arrival, boundary: str) -> None:
    if bank is None or not bool(arrival.starts.any()):
        return
    rows = arrival.starts.nonzero().flatten()
    bank.end_document(rows)
    if boundary == "reset":
        bank.reset(rows)


def _problems(model: Any, args: TrainingArguments, trainer: Mapping[str, Any]) -> list[str]:
    """What would tear rows out of their order, or that this Trainer does not know, one line each."""
    found = []
    if not isinstance(model, LongMem):
        found.append(f"model ({type(model).__name__}) must be a LongMem; make one with LongMem.from_backbone(...)")
    if args.n_gpu > 1:
        found.append(
            f"one process sees {args.n_gpu} GPUs and would copy the model to each in every step; start a process for "
            "each: accelerate launch, or torchrun"
        )
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        found.append("fsdp is for `longmem train` (optim.parallel = 'fsdp'); this Trainer takes DDP")
    if args.deepspeed:
        found.append("deepspeed knows nothing of a model inside of another; this Trainer takes DDP")
    if args.auto_find_batch_size:
        found.append("auto_find_batch_size would change the rows, and so whose memory is whose; set it to False")
    config = args.accelerator_config
    for name in ("split_batches", "dispatch_batches"):
        if getattr(config, name, None):
            found.append(f"accelerator_config.{name} deals rows out to other processes at every step; leave it off")
    for name in ("model_init", "compute_loss_func"):
        if trainer.get(name) is not None:
            found.append(f"{name} is not taken here; pass the model itself, and override compute_loss")
    return found


def _corpora(documents: Any) -> Any:
    if documents is None:
        return None
    if isinstance(documents, dict):
        return {name: as_corpus(each) for name, each in documents.items()}
    return as_corpus(documents)


def _bank_file(rank: int, world: int) -> str:
    return f"memory-{rank}-of-{world}.pt"


def _whole_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    paths = [
        (int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(paths) if not _missing(path)]


def _missing(folder: Path) -> list[str]:
    """What a checkpoint lacks to be resumed from."""
    banks = list(folder.glob("memory-*-of-*.pt"))
    world = int(banks[0].stem.rpartition("-")[2]) if banks else 1
    wanted = ["config.json", "trainer_state.json", "optimizer.pt", "scheduler.pt"]
    wanted += [_bank_file(rank, world) for rank in range(world)]
    try:
        weights = missing_weights(folder)
    except ValueError:
        weights = [INDEX]
    return weights + [name for name in wanted if not (folder / name).is_file()]


def _check_whole(folder: Path, world: int) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint; train without resuming")
    missing = _missing(folder)
    if missing:
        raise CheckpointError(f"{folder}: not whole, {', '.join(missing)} missing; {_way_out(folder)}")
    written = len(list(folder.glob("memory-*-of-*.pt")))
    if written != world:
        raise CheckpointError(
            f"{folder}: written by {written} processes, there are {world}; start as many (each keeps its rows' memory)"
        )


def _way_out(folder: Path) -> str:
    others = [path for path in _whole_checkpoints(folder.parent) if path.name != folder.name]
    return f"resume from {others[-1].name}" if others else "train without resuming"
