"""Memory-augmented adaptation (paper, section 3.3): ``LongMemTrainer``; ``NeedleTrainer`` also asks for hidden facts.

What is trained is a SideNet over a frozen backbone, or the backbone itself (``MemTRM``). Rows are different texts and
move on segment by segment; the bank holds each row's own past. A segment is read with what the bank held before, and
written only after ``backward``: recomputation must find the memory that ``forward`` read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainingArguments

from longmem.data.facts import draw_facts
from longmem.data.stream import IGNORE, SegmentBatch, SegmentStream
from longmem.data.tokens import TokenCorpus, as_corpus
from longmem.errors import ConfigError
from longmem.memory import MemoryBank
from longmem.memory.encoded import EncodedText, TextMemory
from longmem.memory.session import SessionMemory
from longmem.modeling.baselines import MemTRM
from longmem.modeling.longmem import LongMem
from longmem.progress import Progress
from longmem.training.models import is_gate
from longmem.training.recipe import NeedlesSection
from longmem.training.trainer import Scores, StreamTrainer, token_losses
from longmem.types import AttentionKV

Documents = TokenCorpus | Iterable[Mapping[str, Any]]


class LongMemTrainer(StreamTrainer):
    """``transformers.Trainer`` for a ``LongMem`` or a ``MemTRM``.

    Rows are different texts, ``per_device_train_batch_size`` of them in each process, and a row stays with its process.
    ``gradient_accumulation_steps`` is that many consecutive segments of every row.

    Args:
        model: best with ``side_dtype=torch.float32``.
        args: as ever; without ``max_steps``, an epoch reads as many tokens as the documents have.
        train_dataset: a ``TokenCorpus``, or records with ``input_ids``, a whole document each.
        eval_dataset: the same, or a dict of such; every evaluation begins with an empty memory.
        window: T, tokens of a segment.
        memory: False trains the control, the same model without memory.
        memory_size: M, tokens that each row remembers; None is the model's.
        memory_dtype: of what is remembered; None is the backbone's.
        boundary: whether a row's memory is kept when its next text begins.
        piece_tokens: longer documents are dealt out in pieces of so many tokens; 0 keeps them whole.
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
        eval_dataset: Documents | dict[str, Documents] | None = None,
        window: int = 1024,
        memory: bool = True,
        memory_size: int | None = None,
        memory_dtype: torch.dtype | None = None,
        boundary: Literal["keep", "reset"] = "keep",
        piece_tokens: int = 0,
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
            stream=SegmentStream(
                corpus, window, rows, seed, piece_tokens=piece_tokens, rank=rank, world=world, pad_id=self.pad_id
            ),
            eval_dataset=_corpora(eval_dataset),
            **trainer,
        )
        self.boundary, self.eval_tokens, self.quiet = boundary, eval_tokens, quiet or rank > 0
        self.memory_size = memory_size or model.config.memory_size
        self.memory_dtype = memory_dtype or model.backbone.model.dtype
        self.bank = self.new_bank(rows) if memory else None
        self._unwritten: AttentionKV | None = None
        self._share: Tensor | None = None
        # a MemTRM is measured before it changes
        first: Any = self.eval_dataset if isinstance(model, MemTRM) else {}
        self.backbone_losses = {text.fingerprint: self.validate(text, memory=False) for text in first.values()}

    @property
    def longmem(self) -> Any:
        """The ``LongMem`` or ``MemTRM`` without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def new_bank(self, rows: int, capacity_tokens: int | None = None) -> MemoryBank:
        """An empty one."""
        settings: dict[str, Any] = {"dtype": self.memory_dtype}
        if isinstance(self.longmem, MemTRM):
            settings["fingerprint"] = None  # its weights change, and what older ones wrote is read all the same
        return MemoryBank.for_model(self.longmem, rows, capacity_tokens or self.memory_size, **settings)

    # a step: read, backward, write

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross entropy, in nats, over the targets of all processes."""
        batch: SegmentBatch = inputs
        out, targets = self.read(model, batch, self.bank)
        losses = token_losses(out.logits, targets)
        self.scores.add(losses, targets != IGNORE)
        self._unwritten = out.kv
        self._share = None if out.share is None else out.share.detach()
        # DDP takes the mean of the processes' gradients
        loss = losses.sum() * (self.args.world_size / batch.targets_in_all)
        return (loss, out) if return_outputs else loss

    def after_backward(self, batch: Any) -> None:
        """Write the segment."""
        if self.bank is not None and self._unwritten is not None:
            self.bank.add(self._unwritten, documents=batch.documents, offsets=batch.offsets)
        self._unwritten = None

    def read(self, model: nn.Module, batch: SegmentBatch, memory: MemoryBank | None) -> tuple[Any, Tensor]:
        """The model's output over a segment, and the targets; rows that begin another text end the last one first."""
        if memory is not None and bool(batch.starts.any()):
            rows = batch.starts.nonzero().flatten()
            memory.end_document(rows)
            if self.boundary == "reset":
                memory.reset(rows)
        device = self.args.device
        mask = None if batch.mask is None else batch.mask.to(device, non_blocking=True)
        ids, targets = (part.to(device, non_blocking=True) for part in (batch.ids, batch.targets))
        given = {} if memory is None else {"memory": memory}
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **given), targets

    def status(self) -> dict[str, Any]:
        """How full memory is, and the share that each head gave it in the newest segment."""
        if self.bank is None:
            return {}
        shares = self.longmem.memory_share if self._share is None else self._share.float().mean(dim=(0, 2))
        return {
            "memory_fill": float(self.bank.tokens.float().mean()) / self.bank.capacity_tokens,
            "memory_tokens": self.bank.tokens.tolist(),
            "share": [round(share, 4) for share in shares.tolist()],
        }

    # evaluation

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Losses over consecutive segments of each document, from its beginning, with a bank of its own.

        The protocol is the paper's, which takes the context before a segment from memory alone.

        Returns:
            ``eval_loss``; ``eval_loss_backbone``, of the backbone alone (a MemTRM's as it was before training, on the
            trainer's own ``eval_dataset``); and at the end of a run ``eval_loss_memory_off``.
        """
        chosen: Any = self.eval_dataset if eval_dataset is None else _corpora(eval_dataset)
        metrics: dict[str, float] = {}
        for name, corpus in chosen.items():
            prefix = f"{metric_key_prefix}_{name}_" if name else f"{metric_key_prefix}_"
            metrics[f"{prefix}loss"] = self.validate(corpus, memory=self.bank is not None)
            text, known = corpus.fingerprint, self.backbone_losses
            if text not in known and isinstance(self.longmem, LongMem):
                known[text] = self.validate(corpus, memory=False, backbone=True)
            if text in known:
                metrics[f"{prefix}loss_backbone"] = known[text]
            if self.bank is not None and self.control.should_training_stop:
                metrics[f"{prefix}loss_memory_off"] = self.validate(corpus, memory=False)
        return self.told(metrics)

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

    def save_weights(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """A backbone that is a folder is named relative to the checkpoint's, so that both can move."""
        super().save_weights(folder, weights)
        file = folder / "config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        for name in ("backbone_name_or_path", "start_name_or_path"):
            named = settings.get(name)
            if named and os.path.isabs(named) and os.path.isdir(named):
                settings[name] = os.path.relpath(named, folder)
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _corpora(documents: Any) -> dict[str, TokenCorpus]:
    named = documents if isinstance(documents, dict) else {} if documents is None else {"": documents}
    return {name: as_corpus(each) for name, each in named.items()}


# facts that are hidden in memory and asked for: what `longmem eval needle` measures
#
# A row of ordinary text seldom depends on one place far back. Here every row is a question whose answer is in its
# memory and nowhere else, among real text that holds nothing of the kind. Not in the paper.

RUN = 16  # segments of text that are taken from one place of the corpus
_TEXT, _STEP, _FACTS = 11, 12, 13  # what random numbers are drawn for


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


class NeedleTrainer(LongMemTrainer):
    """A ``LongMemTrainer`` that asks questions, ``[needles]`` of a recipe, at a share of its batches.

    Real text is encoded once, before training. For each question memory is a run of that text, the same for all
    questions of a step, and its own facts, each in two short segments of other text, at a random place and so now and
    then cut in two. Memory grows in the course of the run. Everything is a function of the seed and of how many batches
    have been taken.
    """

    def __init__(self, *args: Any, needles: NeedlesSection, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.needles, self.corpus, self.seed = needles, self.stream.corpus, self.args.seed
        self._taken = 0
        self._asked: dict[int, Asked] = {}
        random = np.random.default_rng([self.seed, _TEXT])
        ids = _places(self.corpus.ids, needles.text_tokens, self.window, random)
        with Progress("encoding what facts are hidden in", len(ids), "segments", quiet=self.quiet) as progress:
            self._text = EncodedText(self.longmem, ids, lambda done: progress.advance())

    def next_batch(self) -> Any:
        """Questions, or segments of text as ever."""
        number, self._taken = self._taken, self._taken + 1
        random = np.random.default_rng([self.seed, _STEP, number, self.args.process_index])
        if random.random() >= self.needles.share:
            return super().next_batch()
        # each question is asked in `repeats` steps, one after the other, so that its facts are encoded once
        rows, fresh = self.needles.rows, max(1, self.needles.rows // self.needles.repeats)
        numbers = range(number * fresh, number * fresh + rows)
        self._asked = {at: self._asked.get(at) or self._question(at) for at in numbers}
        ids, targets, keys, values = (
            pad_sequence(list(parts), batch_first=True, padding_value=fill)
            for parts, fill in zip(zip(*self._asked.values(), strict=True), (self.pad_id, IGNORE, 0, 0), strict=True)
        )
        lengths = torch.tensor([[len(one.keys)] for one in self._asked.values()], device=keys.device)
        kept = torch.arange(keys.shape[1], device=keys.device) < lengths
        facts = self.new_bank(rows, keys.shape[1])
        facts.add(AttentionKV(keys.transpose(1, 2), values.transpose(1, 2), kept))
        return Questions(ids, targets, SessionMemory(self._background(number, random), facts))

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross entropy, in nats, over the tokens of the answers."""
        if not isinstance(inputs, Questions):
            return super().compute_loss(model, inputs, return_outputs)
        targets = inputs.targets.to(self.args.device)
        out = model(input_ids=inputs.ids.to(self.args.device), memory=inputs.memory, use_cache=False)
        losses, counted = token_losses(out.logits, targets), targets != IGNORE
        self.practice.add(losses, counted)
        self._share = None if out.share is None else out.share.detach()
        loss = losses.sum() / counted.sum()
        return (loss, out) if return_outputs else loss

    def own_state(self) -> dict[str, Any]:
        return super().own_state() | {"taken": self._taken}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        super().load_own_state(state)
        self._taken = int(state["taken"])

    def _background(self, number: int, random: np.random.Generator) -> TextMemory:
        """A run of the text: its length grows from the least to the most, and now and then is shorter."""
        needles, segments, window = self.needles, len(self._text.ids), self.window
        done = min(1.0, number / needles.grows) if needles.grows else 1.0
        least, most = needles.least_tokens, needles.most_tokens
        tokens = least * (most / least) ** (done * (1.0 if random.random() < 0.7 else random.random()))
        count = min(max(1, round(tokens / window)), segments)
        return self._text.run(int(random.integers(segments - count + 1)), count)

    @torch.no_grad()
    def _question(self, number: int) -> Asked:
        """Drawn by its number. Its facts are hidden in segments (n, context) of their own."""
        needles = self.needles
        random = np.random.default_rng([self.seed, _FACTS, number, self.args.process_index])
        facts = draw_facts(needles.kinds[int(random.integers(len(needles.kinds)))], random)
        parts = []
        for sentence in (*facts.asked, *facts.others):
            tokens = self._tokens(sentence)
            size = max(2, -(-len(tokens) // needles.context)) * needles.context
            start = int(random.integers(self.corpus.num_tokens - size))
            text = self.corpus.ids[start : start + size].astype(np.int64)
            place = int(random.integers(size - len(tokens) + 1))
            text[place : place + len(tokens)] = tokens
            parts.append(text.reshape(-1, needles.context))
        # one question at a time: other batch sizes round differently, and a resumed run encodes more at once
        kv = self.longmem.encode(torch.from_numpy(np.concatenate(parts)).to(self.args.device))
        keys, values = (part.transpose(1, 2).flatten(0, 1) for part in (kv.keys, kv.values))
        question, answer = self._tokens(facts.question), self._tokens(facts.answer)
        ids = torch.tensor(question + answer)
        targets = ids[1:].clone()
        targets[: len(question) - 1] = IGNORE
        return Asked(ids[:-1], targets, keys, values)

    def _tokens(self, text: str) -> list[int]:
        tokenizer: Any = self.tokenizer
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _places(corpus: Any, tokens: int, window: int, random: np.random.Generator) -> Tensor:
    """About so many tokens of a corpus as segments (n, T), from runs that begin at random places."""
    segments = max(1, min(tokens, len(corpus)) // window)
    found = []
    for first in range(0, segments, RUN):
        size = min(RUN, segments - first) * window
        start = int(random.integers(len(corpus) - size + 1))
        found.append(corpus[start : start + size].astype(np.int64).reshape(-1, window))
    return torch.from_numpy(np.concatenate(found))
