"""Memory-augmented adaptation (paper, section 3.3): ``LongMemTrainer``.

What is trained is a SideNet over a frozen backbone, or the backbone itself (``MemTRM``). Rows are different texts and
move on segment by segment; the bank holds each row's own past. A segment is read with what the bank held before, and
written only after ``backward``: recomputation must find the memory that ``forward`` read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from longmem.data.stream import IGNORE, SegmentBatch, SegmentStream
from longmem.data.tokens import TokenCorpus, as_corpus
from longmem.errors import ConfigError
from longmem.memory import MemoryBank
from longmem.modeling.baselines import MemTRM
from longmem.modeling.longmem import LongMem
from longmem.progress import Progress
from longmem.training.models import is_gate
from longmem.training.needles import NeedleStream, Questions
from longmem.training.trainer import Scores, StreamTrainer, token_losses
from longmem.types import AttentionKV, Memory

Documents = TokenCorpus | Iterable[Mapping[str, Any]]


class LongMemTrainer(StreamTrainer):
    """``transformers.Trainer`` for a ``LongMem`` or a ``MemTRM``.

    Rows are different texts, ``per_device_train_batch_size`` of them in each process, and a row stays with its process.
    ``gradient_accumulation_steps`` is that many consecutive segments of every row.

    Args:
        model: best with ``side_dtype=torch.float32``.
        args: as ever; without ``max_steps``, an epoch reads as many tokens as the documents have.
        train_dataset: a ``TokenCorpus``, or records with ``input_ids``, a whole document each.
        eval_dataset: the same; every evaluation begins with an empty memory.
        window: T, tokens of a segment.
        memory: False trains the control, the same model without memory.
        memory_size: M, tokens that each row remembers; None is the model's.
        memory_dtype: of what is remembered; None is the backbone's.
        boundary: whether a row's memory is kept when its next text begins.
        piece_tokens: longer documents are dealt out in pieces of so many tokens; 0 keeps them whole.
        stream: of batches, in place of segments of ``train_dataset``.
        eval_tokens: of each evaluation; None reads every document to its end.
        quiet: no progress on stderr.
        **trainer: further arguments of ``StreamTrainer`` and ``Trainer``.

    Raises:
        ConfigError: arguments that would tear texts out of their order; all of them are listed.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Documents,
        eval_dataset: Documents | None = None,
        window: int = 1024,
        memory: bool = True,
        memory_size: int | None = None,
        memory_dtype: torch.dtype | None = None,
        boundary: Literal["keep", "reset"] = "keep",
        piece_tokens: int = 0,
        stream: NeedleStream | None = None,
        eval_tokens: int | None = None,
        quiet: bool = False,
        **trainer: Any,
    ) -> None:
        if not isinstance(model, LongMem | MemTRM):
            name = type(model).__name__
            raise ConfigError(f"model ({name}) must be a LongMem or a MemTRM; make one with LongMem.from_backbone(...)")
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        corpus, rows = as_corpus(train_dataset), args.per_device_train_batch_size
        if args.max_steps <= 0:
            step = rows * window * args.world_size * args.gradient_accumulation_steps
            args.max_steps = max(1, round(args.num_train_epochs * corpus.num_tokens / step))
        # without memory the gate takes no part, and DDP would wait for it
        for name, weight in model.named_parameters():
            if is_gate(name):
                weight.requires_grad_(memory)
        tokenizer = trainer.get("tokenizer") or trainer.get("processing_class")
        seed, rank, world = args.seed if args.data_seed is None else args.data_seed, args.process_index, args.world_size
        self.window, self.pad_id = window, getattr(tokenizer, "pad_token_id", None) or 0
        trainer["same"] = trainer.get("same") or {
            "window": window, "piece_tokens": piece_tokens, "boundary": boundary, "memory": memory,
        }  # fmt: skip
        super().__init__(
            model,
            args,
            stream=stream
            or SegmentStream(
                corpus, window, rows, seed, piece_tokens=piece_tokens, rank=rank, world=world, pad_id=self.pad_id
            ),
            eval_dataset=[] if eval_dataset is None else as_corpus(eval_dataset),
            **trainer,
        )
        self.boundary, self.eval_tokens, self.quiet = boundary, eval_tokens, quiet or rank > 0
        self.memory_size = memory_size or model.config.memory_size
        self.memory_dtype = memory_dtype or model.backbone.model.dtype
        self.memory = memory
        self.bank = self.new_bank(rows) if memory and stream is None else None  # questions bring their own
        self._unwritten: AttentionKV | None = None
        self._share: Tensor | None = None
        self.backbone_losses: dict[str, float] = {}
        if isinstance(model, MemTRM) and (valid := self.eval_dataset):  # before it changes
            self.backbone_losses[valid.fingerprint] = self.validate(valid, memory=False)

    @property
    def longmem(self) -> Any:
        """The ``LongMem`` or ``MemTRM`` without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def new_bank(self, rows: int) -> MemoryBank:
        """An empty one."""
        settings: dict[str, Any] = {"dtype": self.memory_dtype}
        if isinstance(self.longmem, MemTRM):
            settings["fingerprint"] = None  # its weights change, and what older ones wrote is read all the same
        return MemoryBank.for_model(self.longmem, rows, self.memory_size, **settings)

    # a step: read, backward, write

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross entropy, in nats, over the targets of all processes; over this process's answers to questions."""
        asked = isinstance(inputs, Questions)
        out, targets = self.read(model, inputs, inputs.memory if asked else self.bank)
        losses, counted = token_losses(out.logits, targets), targets != IGNORE
        self.scores.add(losses, counted)
        self._unwritten = None if asked else out.kv
        self._share = None if out.share is None else out.share.detach()
        # DDP takes the mean of the processes' gradients
        loss = losses.sum()
        loss = loss / counted.sum() if asked else loss * (self.args.world_size / inputs.targets_in_all)
        return (loss, out) if return_outputs else loss

    def after_backward(self, batch: Any) -> None:
        """Write the segment."""
        if self.bank is not None and self._unwritten is not None:
            self.bank.add(self._unwritten, documents=batch.documents, offsets=batch.offsets)
        self._unwritten = None

    def read(self, model: nn.Module, batch: SegmentBatch | Questions, memory: Memory | None) -> tuple[Any, Tensor]:
        """The model's output over a batch, and the targets; rows that begin another text end the last one first."""
        device, mask = self.args.device, None
        if isinstance(batch, SegmentBatch):
            if isinstance(memory, MemoryBank) and bool(batch.starts.any()):
                rows = batch.starts.nonzero().flatten()
                memory.end_document(rows)
                if self.boundary == "reset":
                    memory.reset(rows)
            mask = None if batch.mask is None else batch.mask.to(device, non_blocking=True)
        ids, targets = (part.to(device, non_blocking=True) for part in (batch.ids, batch.targets))
        given = {} if memory is None else {"memory": memory}
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **given), targets

    def status(self) -> dict[str, Any]:
        """How full memory is, and the share that each head gave it in the newest segment."""
        if not self.memory:
            return {}
        shares = self.longmem.memory_share if self._share is None else self._share.float().mean(dim=(0, 2))
        found: dict[str, Any] = {"share": [round(share, 4) for share in shares.tolist()]}
        if self.bank is not None:
            tokens = self.bank.tokens
            found["memory_fill"] = float(tokens.float().mean()) / self.bank.capacity_tokens
            found["memory_tokens"] = tokens.tolist()
        return found

    # evaluation

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Losses over consecutive segments of each document, from its beginning, with a bank of its own.

        The protocol is the paper's, which takes the context before a segment from memory alone.

        Returns:
            ``eval_loss``; ``eval_loss_backbone``, of the backbone alone (a MemTRM's as it was before training, on the
            trainer's own ``eval_dataset``); and at the end of a run, but one that patience ends,
            ``eval_loss_memory_off``.
        """
        corpus = self.eval_dataset if eval_dataset is None else as_corpus(eval_dataset)
        if not corpus:
            return {}
        found, known = {"loss": self.validate(corpus, memory=self.memory)}, self.backbone_losses
        if corpus.fingerprint not in known and isinstance(self.longmem, LongMem):
            known[corpus.fingerprint] = self.validate(corpus, memory=False, backbone=True)
        if corpus.fingerprint in known:
            found["loss_backbone"] = known[corpus.fingerprint]
        if self.memory and self.control.should_training_stop:
            found["loss_memory_off"] = self.validate(corpus, memory=False)
        return self.told({f"{metric_key_prefix}_{name}": loss for name, loss in found.items()})

    @torch.no_grad()
    def validate(self, corpus: TokenCorpus, memory: bool, backbone: bool = False) -> float:
        """Mean loss in nats over the text."""
        self.longmem.train(False)
        # documents stay whole: each is read from its beginning with all its past
        together = min(self.args.per_device_eval_batch_size, len(corpus))
        rank, world = self.args.process_index, self.args.world_size
        if together % world:
            rank, world = 0, 1  # every process reads everything
        stream = SegmentStream(corpus, self.window, together // world, None, rank=rank, world=world, pad_id=self.pad_id)
        bank = self.new_bank(stream.rows) if memory else None
        model = self.longmem.backbone.model if backbone else self.longmem
        if backbone and self.divided:
            self.longmem.unshard()  # embeddings and head are the root's, which does not run here
        scores, tokens = Scores(), min(self.eval_tokens or corpus.num_tokens, corpus.num_tokens)
        steps = max(1, tokens // (together * self.window))
        what = "validating the backbone" if backbone else "validating" if memory else "validating without memory"
        with Progress(what, steps * together * self.window, "tokens", quiet=self.quiet) as progress:
            for _ in range(steps):
                batch = stream.next()
                with self.accelerator.autocast():
                    out, targets = self.read(model, batch, bank)
                scores.add(token_losses(out.logits, targets), targets != IGNORE)
                if bank is not None:
                    bank.add(out.kv, documents=batch.documents, offsets=batch.offsets)
                progress.advance(together * self.window)
        return scores.gather(self.args.device).mean

    # checkpoints

    def own_state(self) -> dict[str, Any]:
        return super().own_state() | {"bank": None if self.bank is None else self.bank.state_dict()}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        super().load_own_state(state)
        if self.bank is not None:
            self.bank.load_state_dict(state["bank"])

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        # a backbone that is a folder is named relative to the checkpoint's, so that both can move
        folder = Path(output_dir or str(self.args.output_dir))
        file = folder / "config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        for name in ("backbone_name_or_path", "start_name_or_path"):
            named = settings.get(name)
            if named and os.path.isabs(named) and os.path.isdir(named):
                settings[name] = os.path.relpath(named, folder)
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
