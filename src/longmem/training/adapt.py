"""Memory-augmented adaptation (paper, section 3.3): ``LongMemTrainer``; and ``NeedleStream``, which gives it questions
about hidden facts in place of text.

What is trained is a SideNet over a frozen backbone, or the backbone itself (``MemTRM``). Rows are different texts and
move on segment by segment; the bank holds each row's own past. A segment is read with what the bank held before, and
written only after ``backward``: recomputation must find the memory that ``forward`` read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainingArguments

from longmem.data.facts import draw_facts
from longmem.data.stream import IGNORE, SegmentBatch, SegmentStream
from longmem.data.tokens import TokenCorpus, as_corpus, token_ids
from longmem.errors import ConfigError, DataError
from longmem.memory import MemoryBank
from longmem.memory.session import EncodedText, SessionMemory
from longmem.modeling.baselines import MemTRM
from longmem.modeling.longmem import LongMem
from longmem.progress import Progress
from longmem.training.models import is_gate
from longmem.training.recipe import NeedlesSection
from longmem.training.trainer import StreamTrainer
from longmem.types import AttentionKV, Memory

Documents = TokenCorpus | Iterable[Mapping[str, Any]]
RUN = 16  # segments of text that are taken from one place of the corpus
_TEXT, _STEP, _FACTS = 11, 12, 13  # what random numbers are drawn for


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
        **trainer: further arguments of ``StreamTrainer`` and ``Trainer``.

    Raises:
        ConfigError: arguments that would tear texts out of their order; all of them are listed.
    """

    saving: ClassVar[dict[str, Any]] = {"movable": True}

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
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
        **trainer: Any,
    ) -> None:
        if not isinstance(model, LongMem | MemTRM):
            name = type(model).__name__
            raise ConfigError(f"model ({name}) must be a LongMem or a MemTRM; make one with LongMem.from_backbone(...)")
        corpus, rows = as_corpus(train_dataset), args.per_device_train_batch_size
        if args.max_steps <= 0:
            step = rows * window * args.world_size * args.gradient_accumulation_steps
            args.max_steps = max(1, round(args.num_train_epochs * corpus.num_tokens / step))
        # without memory the gate takes no part, and DDP would wait for it
        for name, weight in model.named_parameters():
            if is_gate(name):
                weight.requires_grad_(memory)
        self.pad_id = getattr(trainer.get("processing_class"), "pad_token_id", None) or 0
        self.memory, self.boundary = memory, boundary
        trainer.setdefault(
            "same", {"window": window, "piece_tokens": piece_tokens, "boundary": boundary, "memory": memory}
        )
        super().__init__(
            model,
            args,
            stream=stream
            or SegmentStream(
                corpus,
                window,
                rows,
                args.seed if args.data_seed is None else args.data_seed,
                piece_tokens=piece_tokens,
                rank=args.process_index,
                world=args.world_size,
                pad_id=self.pad_id,
            ),
            eval_dataset=None if eval_dataset is None else as_corpus(eval_dataset),
            **trainer,
        )
        self.memory_size = memory_size or model.config.memory_size
        self.memory_dtype = memory_dtype or model.backbone.model.dtype
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

    def read(self, model: nn.Module, batch: Any, memory: Memory | None = None) -> tuple[Any, Tensor]:
        """The model's output over a batch, and the targets; rows that begin another text end the last one first."""
        if isinstance(batch, SegmentBatch) and isinstance(memory, MemoryBank) and bool(batch.starts.any()):
            rows = batch.starts.nonzero().flatten()
            memory.end_document(rows)
            if self.boundary == "reset":
                memory.reset(rows)
        return super().read(model, batch, memory)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As ever; what is to be written, and the share that memory had, are kept."""
        loss, out = super().compute_loss(model, inputs, return_outputs=True)
        self._unwritten = out.kv
        self._share = None if out.share is None else out.share.detach()
        return (loss, out) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward over one segment of every row, which is then written."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.bank is not None and self._unwritten is not None:
            self.bank.add(self._unwritten, documents=inputs.documents, offsets=inputs.offsets)
        self._unwritten = None
        return loss

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

    def validate(self, corpus: TokenCorpus, memory: bool, backbone: bool = False) -> float:
        """Mean loss in nats over the text."""
        self.longmem.eval()
        # documents stay whole: each is read from its beginning with all its past
        together = min(self.args.per_device_eval_batch_size, len(corpus))
        rank, world = self.args.process_index, self.args.world_size
        if together % world:
            rank, world = 0, 1  # every process reads everything
        window, rows = self.stream.window, together // world
        stream = SegmentStream(corpus, window, rows, None, rank=rank, world=world, pad_id=self.pad_id)
        steps = max(1, min(self.eval_tokens or corpus.num_tokens, corpus.num_tokens) // (together * window))
        if backbone and self.is_distributed_loading_by_transformers:
            self.longmem.unshard()  # embeddings and head are the root's, which does not run here
        return self.mean_loss(
            self.longmem.backbone.model if backbone else self.longmem,
            (stream.next() for _ in range(steps)),
            "validating the backbone" if backbone else "validating" if memory else "validating without memory",
            steps * rows * window,
            self.new_bank(rows) if memory else None,
        )


# Facts that are hidden in memory and asked for: what ``longmem eval needle`` measures. Not in the paper.
#
# A row of ordinary text seldom depends on one place far back. Here every row is a question whose answer is in its
# memory and nowhere else, among real text that holds nothing of the kind.
#
# B questions · T tokens of a segment of text · t of a question with its answer · n remembered layers · Hkv key/value
# heads · D head_dim


class Asked(NamedTuple):
    """A question with its answer: ids and targets (t,), of which only the answer counts; and what its facts left in
    memory, keys and values (tokens, n*Hkv, D)."""

    ids: Tensor
    targets: Tensor
    keys: Tensor
    values: Tensor


class Questions(NamedTuple):
    """A batch of them, (B, t), and what they are asked of."""

    ids: Tensor
    targets: Tensor
    memory: SessionMemory


@dataclass(eq=False)
class NeedleStream:
    """Batches of questions for a ``LongMemTrainer``, in place of segments of text.

    Real text is encoded once, before the first question. For each question memory is a run of that text, the same for
    all questions of a step, and its own facts, each in two short segments of other text, at a random place and so now
    and then cut in two. Memory grows in the course of the run. Everything is a function of the seed and of how many
    batches have been taken.

    Args:
        model: whose backbone encodes text and facts.
        window: T.
        memory_dtype: of the facts' keys and values.
        rank: of this process, which asks questions of its own.
    """

    model: Any
    corpus: TokenCorpus
    tokenizer: Any
    settings: NeedlesSection
    _: KW_ONLY
    window: int
    memory_dtype: torch.dtype
    seed: int = 1
    rank: int = 0
    quiet: bool = False
    epoch: float = field(default=0.0, init=False)
    _taken: int = field(default=0, init=False)
    _asked: dict[int, Asked] = field(default_factory=dict, init=False)

    def next(self) -> Questions:
        """The next questions."""
        settings, number, self._taken = self.settings, self._taken, self._taken + 1
        # each question is asked in `repeats` steps, one after the other, so that its facts are encoded once
        rows, fresh = settings.rows, max(1, settings.rows // settings.repeats)
        numbers = range(number * fresh, number * fresh + rows)
        self._asked = {at: self._asked.get(at) or self._question(at) for at in numbers}
        ids, targets, keys, values = (
            pad_sequence(list(parts), batch_first=True, padding_value=fill)
            for parts, fill in zip(zip(*self._asked.values(), strict=True), (0, IGNORE, 0, 0), strict=True)
        )
        lengths = torch.tensor([[len(one.keys)] for one in self._asked.values()], device=keys.device)
        kept = torch.arange(keys.shape[1], device=keys.device) < lengths
        facts = MemoryBank.for_model(self.model, rows, keys.shape[1], dtype=self.memory_dtype)
        facts.add(AttentionKV(keys.transpose(1, 2), values.transpose(1, 2), kept))
        return Questions(ids, targets, SessionMemory(self._background(number), facts))

    def state_dict(self) -> dict[str, Any]:
        """How many batches were taken."""
        return {"taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._taken = int(state["taken"])

    @cached_property
    def _text(self) -> EncodedText:
        """About ``text_tokens`` of the corpus in segments (n, T), from runs that begin at random places."""
        random, corpus = np.random.default_rng([self.seed, _TEXT]), self.corpus.ids
        segments, found = max(1, min(self.settings.text_tokens, len(corpus)) // self.window), []
        for first in range(0, segments, RUN):
            size = min(RUN, segments - first) * self.window
            start = int(random.integers(len(corpus) - size + 1))
            found.append(corpus[start : start + size].astype(np.int64).reshape(-1, self.window))
        ids = torch.from_numpy(np.concatenate(found))
        with Progress("encoding what facts are hidden in", len(ids), "segments", quiet=self.quiet) as progress:
            return EncodedText(self.model, ids, lambda done: progress.advance())

    def _background(self, number: int) -> MemoryBank:
        """A run of the text: its length grows from the least to the most, and now and then is shorter."""
        random = np.random.default_rng([self.seed, _STEP, number, self.rank])
        random.random()  # runs that mixed in steps of text drew it: the same seed still gives the same run
        settings, segments = self.settings, len(self._text.ids)
        done = min(1.0, number / settings.grows) if settings.grows else 1.0
        least, most = settings.least_tokens, settings.most_tokens
        tokens = least * (most / least) ** (done * (1.0 if random.random() < 0.7 else random.random()))
        count = min(max(1, round(tokens / self.window)), segments)
        return self._text.run(int(random.integers(segments - count + 1)), count)

    @torch.no_grad()
    def _question(self, number: int) -> Asked:
        """Drawn by its number. Its facts are hidden in segments (n, context) of their own."""
        settings, random = self.settings, np.random.default_rng([self.seed, _FACTS, number, self.rank])
        facts = draw_facts(settings.kinds[int(random.integers(len(settings.kinds)))], random)
        parts = []
        for sentence in (*facts.asked, *facts.others):
            tokens = token_ids(self.tokenizer, sentence)
            size = max(2, -(-len(tokens) // settings.context)) * settings.context
            if size >= self.corpus.num_tokens:
                raise DataError(
                    f"the corpus has {self.corpus.num_tokens} tokens, not more than a fact is hidden in "
                    f"(needles.context ({settings.context}), {size} tokens); give more text or a smaller context"
                )
            start = int(random.integers(self.corpus.num_tokens - size))
            text = self.corpus.ids[start : start + size].astype(np.int64)
            place = int(random.integers(size - len(tokens) + 1))
            text[place : place + len(tokens)] = tokens
            parts.append(text.reshape(-1, settings.context))
        # one question at a time: other batch sizes round differently, and a resumed run encodes more at once
        kv = self.model.encode(torch.from_numpy(np.concatenate(parts)).to(self.model.device))
        keys, values = (part.transpose(1, 2).flatten(0, 1) for part in (kv.keys, kv.values))
        question, answer = (token_ids(self.tokenizer, text) for text in (facts.question, facts.answer))
        ids = torch.tensor(question + answer)
        targets = ids[1:].clone()
        targets[: len(question) - 1] = IGNORE
        return Asked(ids[:-1], targets, keys, values)
