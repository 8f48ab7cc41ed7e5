"""From a released checkpoint and its vocabulary to a folder that ``from_pretrained`` opens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from longmem.convert.fairseq import (
    FairseqCheckpoint,
    backbone_from_fairseq,
    load_tensors,
    longmem_config,
    read_fairseq,
)
from longmem.errors import CheckpointError
from longmem.modeling.alibi_gpt import AlibiGPTConfig
from longmem.modeling.loading import load_backbone
from longmem.modeling.longmem import LongMem

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
"""Ids 0 to 3 of every fairseq dictionary."""


@dataclass(frozen=True)
class Converted:
    """What was written."""

    kind: str  # ``backbone`` or ``longmem``
    out: str
    backbone: str  # its folder; the same as ``out`` for a backbone
    parameters: int
    trained: int  # those of the SideNet; 0 for a backbone
    dtype: str
    ignored: list[str]  # tensors of the file that mean nothing to us


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
    out = place = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is there already and not empty; choose another --out or remove it")
    read = read_fairseq(checkpoint, settings)
    if not read.side and backbone is not None:
        raise CheckpointError(f"{checkpoint}: is a backbone itself; --backbone belongs to a LongMem checkpoint")
    beside = Path(backbone) if backbone is not None and Path(backbone).is_dir() else None
    longmem = None
    if read.side:
        place = beside or out / "backbone"
        longmem = longmem_from_fairseq(read, None if backbone is None else _given(read, Path(backbone), dtype), dtype)
    base: Any = backbone_from_fairseq(read, dtype) if longmem is None else longmem.backbone.model
    tokenizer = None  # made before anything is written: what does not fit leaves no folder behind
    if vocabulary is not None:
        tokenizer = tokenizer_from_fairseq(vocabulary, base.config.vocab_size, base.config.max_position_embeddings)
    if beside is None:
        base.save_pretrained(place)
    if longmem is not None:
        # a backbone inside is named by its place beside the SideNet: the folder can be moved
        longmem.config.backbone_name_or_path = place.name if beside is None else str(beside.resolve())
        longmem.save_pretrained(out)
    if tokenizer is not None:
        for folder in {out, beside or place} - {beside}:
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
    checkpoint: FairseqCheckpoint, backbone: PreTrainedModel | None = None, dtype: torch.dtype | None = None
) -> LongMem:
    """The LongMem in a released checkpoint, over a given backbone or the one in the checkpoint."""
    backbone = backbone or backbone_from_fairseq(checkpoint, dtype)
    if not isinstance(backbone.config, AlibiGPTConfig):
        raise CheckpointError(f"{checkpoint.path}: needs an alibi_gpt backbone, not a {backbone.config.model_type}")
    model = LongMem(longmem_config(checkpoint, backbone.config), backbone)
    model.sidenet.to(dtype or next(iter(checkpoint.side.values())).dtype)
    load_tensors(checkpoint.path, model.sidenet, checkpoint.side)
    model.train(False)
    return model


def _given(read: FairseqCheckpoint, path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The backbone that was named; it must be the one inside, where there is one."""
    given = load_backbone(str(path), None, dtype) if path.is_dir() else backbone_from_fairseq(path, dtype)
    theirs = given.state_dict()
    for name, own in read.backbone.items():
        other = theirs.get(name, own[:0])
        # the coarser of the two dtypes decides, so that a half copy of the same weights is still the same
        coarse = min(own.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(own.to(coarse), other.to(coarse)):
            raise CheckpointError(
                f"{path}: its {name} differs from the backbone inside {read.path}; "
                "leave --backbone away to use the one inside"
            )
    return given


def tokenizer_from_fairseq(folder: str | Path, rows: int, window: int | None = None) -> PreTrainedTokenizerFast:
    """The released code's vocabulary as a tokenizer of transformers.

    Text goes through GPT-2's byte pairs (``encoder.json``, ``vocab.bpe``), and GPT-2's ids through a fairseq dictionary
    (``dict.txt``): line n, counted from 0, is id n + 4, behind ``<s>``, ``<pad>``, ``</s>`` and ``<unk>``. Here both
    steps are one table: the byte pairs carry the dictionary's ids.

    Args:
        rows: of the model's embeddings (51,200 in the released ones); the dictionary must have as many.
        window: tokens that the model attends to, ``model_max_length``.
    """
    folder = Path(folder)
    try:
        encoder, merges, symbols = ((folder / name).read_text(encoding="utf-8") for name in
                                    ("encoder.json", "vocab.bpe", "dict.txt"))  # fmt: skip
        spelled = {str(number): token for token, number in json.loads(encoder).items()}
        pairs: Any = [
            tuple(line.split()) for line in merges.split("\n") if line.strip() and not line.startswith("#version")
        ]
        # what is no id fills the table up to its size
        names = [spelled.get(symbol, symbol) for line in symbols.split("\n") if (symbol := line.rsplit(" ", 1)[0])]
        vocabulary = {token: number for number, token in enumerate([*SPECIAL.values(), *names])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as problem:  # missing, no JSON, or a pair that is not in the table: tokenizers raises only this
        files = "encoder.json, vocab.bpe and dict.txt of the released code"
        raise CheckpointError(f"{folder}: is not a folder with {files} ({problem})") from problem
    known = len(vocabulary)
    if (
        known != rows
        or known != len(names) + len(SPECIAL)
        or not vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet())
    ):
        raise CheckpointError(
            f"{folder / 'dict.txt'}: {len(names):,} lines and {len(SPECIAL)} special tokens make {known:,} ids, the "
            f"checkpoint has {rows:,}, all 256 bytes among them; give the dictionary it was trained with"
        )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    settings: dict[str, Any] = {**SPECIAL} if window is None else {**SPECIAL, "model_max_length": window}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **settings)
