"""From a released checkpoint to a folder that ``from_pretrained`` opens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longmem.convert.fairseq import (
    FairseqCheckpoint,
    backbone_from_fairseq,
    check_tensors,
    longmem_config,
    read_fairseq,
)
from longmem.convert.vocabulary import tokenizer_from_fairseq
from longmem.errors import CheckpointError
from longmem.modeling.alibi_gpt import AlibiGPTConfig
from longmem.modeling.loading import load_backbone
from longmem.modeling.longmem import LongMem


@dataclass(frozen=True)
class Converted:
    """What was written."""

    kind: str
    """``backbone`` or ``longmem``."""
    out: str
    backbone: str
    """Its folder; the same as ``out`` for a backbone."""
    parameters: int
    trained: int
    """Those of the SideNet; 0 for a backbone."""
    dtype: str
    ignored: list[str]
    """Tensors of the file that mean nothing to us."""


def convert(
    checkpoint: str | Path,
    out: str | Path,
    backbone: str | Path | None = None,
    settings: str | Path | None = None,
    dtype: torch.dtype | None = None,
    vocabulary: str | Path | None = None,
) -> Converted:
    """Convert a released checkpoint; a LongMem goes to ``out`` and its backbone to ``out/backbone``.

    Args:
        checkpoint: backbone or LongMem, ``.pt`` or ``.safetensors``.
        out: folder to write; it must not exist, or be empty.
        backbone: for a LongMem: the backbone's own checkpoint, or a folder where it was converted to. Where the LongMem
            file holds a backbone too, the two must be equal.
        settings: JSON with the settings of a ``.safetensors``.
        dtype: of the weights; None keeps the file's.
        vocabulary: folder of ``encoder.json``, ``vocab.bpe`` and ``dict.txt``, to write the tokenizer too.

    Raises:
        CheckpointError: a file is missing, damaged or foreign, or ``out`` is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is there already and not empty; choose another --out or remove it")
    read = read_fairseq(checkpoint, settings)
    if not read.is_longmem and backbone is not None:
        raise CheckpointError(f"{checkpoint}: is a backbone itself; --backbone belongs to a LongMem checkpoint")
    longmem, place, beside = None, out, False
    if read.is_longmem:
        beside = backbone is not None and Path(backbone).is_dir()
        place = Path(str(backbone)) if beside else out / "backbone"
        longmem = longmem_from_fairseq(read, _given_backbone(read, backbone, dtype), dtype)
    base: Any = backbone_from_fairseq(read, dtype) if longmem is None else longmem.backbone.model
    tokenizer = None  # made before anything is written: what does not fit leaves no folder behind
    if vocabulary is not None:
        tokenizer = tokenizer_from_fairseq(vocabulary, base.config.vocab_size, base.config.max_position_embeddings)
    if not beside:
        base.save_pretrained(place)
    if longmem is not None:
        # a backbone inside is named by its place beside the SideNet: the folder can be moved
        longmem.config.backbone_name_or_path = str(place.resolve()) if beside else place.name
        longmem.save_pretrained(out)
    if tokenizer is not None:
        for folder in {out} if beside else {out, place}:
            tokenizer.save_pretrained(str(folder))
    return Converted(
        kind="backbone" if longmem is None else "longmem",
        out=str(out),
        backbone=str(place),
        parameters=sum(each.numel() for each in (longmem or base).parameters()),
        trained=sum(value.numel() for value in read.side.values()),
        dtype=str(next(base.parameters()).dtype).removeprefix("torch."),
        ignored=read.ignored,
    )


def longmem_from_fairseq(
    checkpoint: FairseqCheckpoint | str | Path,
    backbone: PreTrainedModel | None = None,
    dtype: torch.dtype | None = None,
) -> LongMem:
    """The LongMem in a released checkpoint, over a given backbone or the one in the checkpoint."""
    if not isinstance(checkpoint, FairseqCheckpoint):
        checkpoint = read_fairseq(checkpoint)
    if not checkpoint.is_longmem:
        raise CheckpointError(f"{checkpoint.path}: holds a backbone without a SideNet; a LongMem checkpoint is needed")
    backbone = backbone or backbone_from_fairseq(checkpoint, dtype)
    if not isinstance(backbone.config, AlibiGPTConfig):
        raise CheckpointError(f"{checkpoint.path}: needs an alibi_gpt backbone, not a {backbone.config.model_type}")
    model = LongMem(longmem_config(checkpoint, backbone.config), backbone)
    own: dict[str, Tensor] = model.sidenet.state_dict()
    check_tensors(checkpoint.path, checkpoint.side, own, "SideNet")
    dtype = dtype or checkpoint.side["final_norm.weight"].dtype
    model.sidenet.to(dtype)
    model.sidenet.load_state_dict({name: value.to(dtype) for name, value in checkpoint.side.items()})
    model.train(False)
    return model


def _given_backbone(
    read: FairseqCheckpoint, backbone: str | Path | None, dtype: torch.dtype | None
) -> PreTrainedModel | None:
    if backbone is None:
        return None
    path = Path(backbone)
    given = load_backbone(str(path), None, dtype) if path.is_dir() else backbone_from_fairseq(path, dtype)
    theirs = given.state_dict()
    for name, own in read.backbone.items():
        # the coarser of the two dtypes decides, so that a half copy of the same weights is still the same
        if name not in theirs or not _equal(own, theirs[name]):
            raise CheckpointError(
                f"{path}: its {name} differs from the backbone inside {read.path}; "
                "leave --backbone away to use the one inside"
            )
    return given


def _equal(left: Tensor, right: Tensor) -> bool:
    coarse = min(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
    return left.shape == right.shape and torch.equal(left.to(coarse), right.to(coarse))
