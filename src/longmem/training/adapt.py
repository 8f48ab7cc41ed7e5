"""``task = "adapt"``: memory-augmented adaptation (paper, section 3.3).

What is trained is a SideNet over a frozen backbone, or with ``method = "memtrm"`` the backbone itself. Rows are
different texts and move on segment by segment; the bank holds each row's own past. A segment is read with what the bank
held before, and written only after ``backward``.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from longmem.data.stream import SegmentBatch, SegmentStream
from longmem.data.tokens import TokenCorpus
from longmem.data.windows import IGNORE
from longmem.errors import CheckpointError, ConfigError
from longmem.memory import MemoryBank
from longmem.modeling.longmem import LongMem
from longmem.modeling.memtrm import MemTRM
from longmem.modeling.placement import quantization
from longmem.training.recipe import Recipe, SideNetSection
from longmem.training.sharding import assign
from longmem.training.tasks import Scores, StepScores, runs_bf16, set_dropout, storage_dtype, token_losses
from longmem.types import AttentionKV


class Adaptation:
    """See ``Task``. Only the SideNet and its memory gates are trained; of a ``MemTRM``, everything.

    Args:
        recipe: with ``task = "adapt"``.
        tokenizer: the backbone's.
        train: corpus whose documents the rows read.
        valid: corpus of [eval]; may be None.
        device: where model and bank are.
        rank: number of this process.
        world: number of processes.
        divided: the model stays on the CPU, until FSDP2 divides it.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        train: TokenCorpus,
        valid: TokenCorpus | None,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        *,
        divided: bool = False,
    ) -> None:
        if recipe.backbone.device_map is not None and world > 1:
            raise ConfigError(
                f"backbone.device_map ({recipe.backbone.device_map!r}) spreads one process over all devices, and there "
                f"are {world} processes; start one, or leave it away"
            )
        self.recipe, self.tokenizer, self.valid, self.device = recipe, tokenizer, valid, device
        self.longmem = build_adapted(recipe, device, resident=not divided)
        self.model: nn.Module = self.longmem
        _check_vocabulary(self.longmem, tokenizer, recipe)
        data, optim = recipe.data, recipe.optim
        self.pad_id = tokenizer.pad_token_id or 0
        self.stream = SegmentStream(
            train,
            data.window,
            optim.rows,
            recipe.run.seed,
            piece_tokens=data.piece_tokens,
            rank=rank,
            world=world,
            pad_id=self.pad_id,
        )
        self.rank, self.world = rank, world
        self.bank = self._training_bank() if recipe.sidenet.memory else None
        self.tokens_per_batch = optim.rows * optim.segments * data.window
        self._unwritten: tuple[AttentionKV, SegmentBatch] | None = None
        self._share: Tensor | None = None
        self._backbone_loss: float | None = None

    def describe(self) -> str:
        model, corpus = self.longmem, self.stream.corpus
        count = sum(weight.numel() for weight in model.trainable_parameters())
        memory = f"memory of layer {model.memory_layer}" if self.bank is not None else "no memory (control)"
        what = "training a MemTRM" if isinstance(model, MemTRM) else "adapting a SideNet"
        return (
            f"{what} of {count:,} parameters, {memory}, on {corpus.num_tokens:,} tokens of {len(corpus):,} "
            f"documents, {len(self.stream.pieces):,} texts"
        )

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        wanted = set(self.longmem.trainable_parameter_names())
        return ((name, weight) for name, weight in self.longmem.named_parameters() if name in wanted)

    def loss(self, model: nn.Module, scores: StepScores) -> Tensor:
        if isinstance(self.longmem, MemTRM) and self.valid is not None and self._backbone_loss is None:
            self._backbone_loss = self._loss_at_start()
        batches = [self.stream.next() for _ in range(self.recipe.optim.segments)]
        if self.bank is not None:
            turn_over(self.bank, batches[0], self.recipe.sidenet.boundary)
        ids, mask, targets = (_to(part, self.device) for part in _joined(batches))
        assert targets is not None
        out = model(input_ids=ids, attention_mask=mask, memory=self.bank, use_cache=False)
        losses = token_losses(out.logits, targets)
        scores.text.add(losses, targets != IGNORE)
        self._unwritten = (out.kv, batches[-1])
        self._share = None if out.share is None else out.share.detach()
        # the mean over the targets of all processes, whose average gradient is taken; of several segments, the mean of
        # each one's mean: what they would give one after the other
        means = [part.sum() * (self.world / batch.targets_in_all) for part, batch in _pairs(losses, batches)]
        return torch.stack(means).mean()

    def after_backward(self) -> None:
        """Write the segment: recomputation in ``backward`` must find the memory that ``forward`` read."""
        if self.bank is not None and self._unwritten is not None:
            remember(self.bank, *self._unwritten)
        self._unwritten = None

    def status(self) -> dict[str, Any]:
        """Passes over the corpus, memory fill, and the share that each head gave to memory in the newest segment."""
        status: dict[str, Any] = {"epoch": round(self.stream.epoch, 4)}
        if self.bank is not None:
            status["memory_fill"] = float(self.bank.tokens.float().mean()) / self.bank.capacity_tokens
            status["memory_tokens"] = self.bank.tokens.tolist()
            shares = self.longmem.memory_share if self._share is None else self._share.float().mean(dim=(0, 2))
            status["share"] = [round(share, 4) for share in shares.tolist()]
        return status

    @torch.no_grad()
    def evaluate(self, autocast: AbstractContextManager[Any], final: bool) -> dict[str, Any]:
        """Losses over consecutive segments of the validation text, with a bank of its own.

        Returns:
            ``loss`` as trained, ``loss_backbone`` of the backbone alone on the same segments (as training found it),
            and at the end of a run with memory ``loss_memory_off``. The protocol is the paper's, which takes the
            context before each segment from the backbone; ``longmem eval perplexity`` also measures the other one.
        """
        if self.valid is None:
            return {}
        self.longmem.train(False)
        result = {"loss": self._validate(autocast, memory=self.bank is not None)}
        if self._backbone_loss is None:
            self._backbone_loss = self._validate(autocast, memory=False, backbone=True)
        result["loss_backbone"] = self._backbone_loss
        if final and self.bank is not None:
            result["loss_memory_off"] = self._validate(autocast, memory=False)
        self.longmem.train()
        return result

    def state_dict(self) -> dict[str, Any]:
        bank = None if self.bank is None else self.bank.state_dict()
        return {"stream": self.stream.state_dict(), "bank": bank, "backbone_loss": self._backbone_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        if self.bank is not None:
            self.bank.load_state_dict(state["bank"])
        self._backbone_loss = state["backbone_loss"]

    def dealt(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Every row goes on with its own text and memory, whichever process now has it."""
        rows, total = self.recipe.optim.rows, len(states[0]["stream"]["piece"])
        if rows * self.world != total:
            wanted = f"set optim.rows = {total // self.world}" if total % self.world == 0 else f"start {len(states)}"
            raise CheckpointError(
                f"the checkpoint has {total} rows in {len(states)} processes, this run {rows} in each of {self.world}; "
                f"{wanted}, every row has a memory of its own"
            )
        if self.bank is not None:
            raise CheckpointError(f"memory is not dealt to other processes; start {len(states)}, as many as wrote it")
        return dict(states[0])

    def weights(self) -> dict[str, Tensor]:
        return dict(self.trained())

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        assign(self.trained(), weights)

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """What was trained, and the tokenizer.

        A backbone that is a folder is named relative to ``folder``, so that both can move.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config = self.longmem.config
        name = "start_name_or_path" if isinstance(self.longmem, MemTRM) else "backbone_name_or_path"
        named = getattr(config, name)
        if named is not None and Path(named).is_dir():
            self.longmem.config = copy.deepcopy(config)
            setattr(self.longmem.config, name, os.path.relpath(named, folder))
        try:
            self.longmem.save_pretrained(folder, state_dict=weights)
        finally:
            self.longmem.config = config
        self.tokenizer.save_pretrained(str(folder))

    @torch.no_grad()
    def _loss_at_start(self) -> float:
        """Of the backbone, before it is trained itself; read without memory a MemTRM is that backbone."""
        self.longmem.train(False)
        loss = self._validate(nullcontext(), memory=False)
        self.longmem.train()
        return loss

    def _training_bank(self) -> MemoryBank:
        if self.recipe.optim.segments != 1:
            raise ConfigError(f"optim.segments ({self.recipe.optim.segments}) must be 1: memory is written every step")
        return self._new_bank(self.recipe.optim.rows)

    def _new_bank(self, rows: int) -> MemoryBank:
        return MemoryBank.for_model(self.longmem, rows, self.recipe.sidenet.memory_size, **self._bank_settings())

    def _bank_settings(self) -> dict[str, Any]:
        side = self.recipe.sidenet
        on_gpu_bf16 = runs_bf16(self.recipe.optim.precision, self.device) and self.device.type != "cpu"
        dtype = storage_dtype(side.memory_dtype) or (torch.bfloat16 if on_gpu_bf16 else torch.float32)
        settings: dict[str, Any] = {"dtype": dtype, "device": self.device, "shared": side.shared}
        if self.recipe.backbone.device_map is not None:
            del settings["device"]  # where the layer is that searches it
        if isinstance(self.longmem, MemTRM):
            settings["fingerprint"] = None  # its weights change, and what older ones wrote is read all the same
        return settings

    def _validate(self, autocast: AbstractContextManager[Any], memory: bool, backbone: bool = False) -> float:
        assert self.valid is not None
        settings, window = self.recipe.eval, self.recipe.data.window
        # documents stay whole: each is read from its beginning with all its past
        together = min(settings.rows, len(self.valid))
        rank, world = (self.rank, self.world) if together % self.world == 0 else (0, 1)
        rows = together // world
        stream = SegmentStream(self.valid, window, rows, None, rank=rank, world=world, pad_id=self.pad_id)
        bank = self._new_bank(rows) if memory else None
        model = self.longmem.backbone.model if backbone else self.longmem
        reads = {} if backbone else {"memory": bank}
        scores = Scores()
        steps = max(1, min(settings.tokens, self.valid.num_tokens) // (together * window))
        for _ in range(steps):
            batch = stream.next()
            if bank is not None:
                turn_over(bank, batch, self.recipe.sidenet.boundary)
            ids, mask, targets = (_to(part, self.device) for part in (batch.ids, batch.mask, batch.targets))
            assert targets is not None
            with autocast:
                out = model(input_ids=ids, attention_mask=mask, use_cache=False, **reads)
            scores.add(token_losses(out.logits, targets), targets != IGNORE)
            if bank is not None:
                remember(bank, out.kv, batch)
        if world > 1:
            scores.gather(self.device)
        return scores.mean


def turn_over(bank: MemoryBank, batch: SegmentBatch, boundary: str) -> None:
    """Before a segment is read: rows that begin another text end the last one, and forget it where ``reset``."""
    if not bool(batch.starts.any()):
        return
    rows = batch.starts.nonzero().flatten()
    bank.end_document(rows)
    if boundary == "reset":
        bank.reset(rows)


def remember(bank: MemoryBank, kv: AttentionKV, batch: SegmentBatch) -> None:
    """After a segment was read, and after ``backward``: write it, with where it stood."""
    bank.add(kv, documents=batch.documents, offsets=batch.offsets)


def build_adapted(recipe: Recipe, device: torch.device, *, resident: bool = True) -> LongMem | MemTRM:
    """What the recipe trains, its weights in float32; ``resident``: on ``device``, else on the CPU."""
    model = _build_memtrm(recipe) if recipe.method == "memtrm" else _build_longmem(recipe, device)
    optim = recipe.optim
    set_dropout(model.backbone.model if isinstance(model, MemTRM) else model.sidenet, optim.dropout)
    if optim.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    # what is quantised or spread has been put in its place
    if resident and recipe.backbone.quantised is None and recipe.backbone.device_map is None:
        model.to(device)  # type: ignore[arg-type]
    return model


def _build_longmem(recipe: Recipe, device: torch.device) -> LongMem:
    side, named = recipe.sidenet, recipe.backbone
    assert named.path is not None
    halved = torch.bfloat16 if runs_bf16(recipe.optim.precision, device) and device.type != "cpu" else torch.float32
    settings: dict[str, Any] = {} if side.final_state is None else {"final_state": side.final_state}
    loading: dict[str, Any] = {} if named.device_map is None else {"device_map": named.device_map}
    if named.quantised is not None:
        loading = {"device_map": {"": device}, **loading, "quantization_config": quantization(named.quantised, halved)}
    if side.start is not None:
        return _go_on(side, named.path, named.revision, halved if named.dtype is None else storage_dtype(named.dtype))
    model = LongMem.from_backbone(
        named.path,
        memory_layer=side.memory_layer,
        revision=named.revision,
        dtype=halved if named.dtype is None else storage_dtype(named.dtype),
        backbone_kwargs=loading,
        side_dtype=torch.float32,
        stride=side.stride,
        init=side.init,
        fusion=side.fusion,
        chunk_size=side.chunk_size,
        num_retrieved=side.num_retrieved,
        memory_size=side.memory_size,
        **settings,
    )
    nn.init.constant_(model.sidenet.memory_gate, math.log(side.gate / (1 - side.gate)))
    return model


def _go_on(side: SideNetSection, backbone: str, revision: str | None, dtype: torch.dtype | None) -> LongMem:
    """A SideNet that was trained before; how much it retrieves, and from how much, may be another number."""
    assert side.start is not None
    model = LongMem.from_pretrained(side.start, backbone=backbone, dtype=dtype, side_dtype=torch.float32)
    fixed: dict[str, Any] = {"stride": side.stride, "fusion": side.fusion}
    if side.memory_layer is not None:
        fixed["memory_layer"] = side.memory_layer
    other = [
        f"sidenet.{name} ({value!r}) is {getattr(model.config, name)!r} in sidenet.start ({side.start}); set it so"
        for name, value in fixed.items()
        if value != getattr(model.config, name)
    ]
    if other:
        raise ConfigError(other)
    for name in ("chunk_size", "num_retrieved", "memory_size"):
        setattr(model.config, name, getattr(side, name))
    if revision is not None:
        model.config.backbone_revision = revision
    model.config.backbone_name_or_path = backbone
    return model


def _build_memtrm(recipe: Recipe) -> MemTRM:
    """With all that the recipe says of memory; what it says of a SideNet means nothing here."""
    side, named = recipe.sidenet, recipe.backbone
    assert named.path is not None
    return MemTRM.from_backbone(
        named.path,
        memory_layer=side.memory_layer,
        revision=named.revision,
        dtype=torch.float32 if named.dtype is None else storage_dtype(named.dtype),
        fusion=side.fusion,
        gate=side.gate,
        chunk_size=side.chunk_size,
        num_retrieved=side.num_retrieved,
        memory_size=side.memory_size,
    )


def _check_vocabulary(model: LongMem | MemTRM, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    known = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > known:
        raise ConfigError(
            f"data.tokenizer has {len(tokenizer)} tokens, backbone.path ({recipe.backbone.path}) embeds {known}; "
            "use the tokenizer that the backbone was trained with"
        )


def _joined(batches: list[SegmentBatch]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Ids, mask and targets of n segments of B rows as n*B rows, the first segment of every row first."""
    if len(batches) == 1:
        return batches[0].ids, batches[0].mask, batches[0].targets
    mask = None
    if any(batch.mask is not None for batch in batches):
        real = [torch.ones_like(b.ids, dtype=torch.bool) if b.mask is None else b.mask for b in batches]
        mask = torch.cat(real)
    return torch.cat([batch.ids for batch in batches]), mask, torch.cat([batch.targets for batch in batches])


def _pairs(losses: Tensor, batches: list[SegmentBatch]) -> Iterator[tuple[Tensor, SegmentBatch]]:
    """The losses (n*B, T) of each of the n batches."""
    return zip(losses.chunk(len(batches)), batches, strict=True)


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)
