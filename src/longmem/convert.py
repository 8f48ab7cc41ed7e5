"""Checkpoints of the released code (fairseq) into folders that ``from_pretrained`` opens.

They are read without fairseq, and nothing that is in them is run. A fairseq file is one ``torch.save`` dict: ``cfg``
(or ``args``) with the settings, ``model`` with the tensors. Two kinds are known: the backbone ``newgpt`` and LongMem,
which holds its whole backbone. A bare state dict in safetensors with its settings in a JSON file beside it is read as
well.

No sign is turned: the released code's ``memory_bias`` already weighs memory, as ``memory_gate`` does, although the
paper writes the gate the other way round.
"""

from __future__ import annotations

import argparse
import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from longmem.config import LongMemConfig
from longmem.errors import CheckpointError, first_line
from longmem.modeling.alibi_gpt import AlibiGPTConfig, AlibiGPTForCausalLM
from longmem.modeling.longmem import LongMem

BACKBONE_PREFIXES = ("decoder.pretrained_model.decoder.model.", "decoder.model.")
"""Prefixes of the backbone's tensors inside a LongMem file, and in a file of the backbone alone."""

SHARED = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")
"""Tensors that LongMem shares with its backbone; the released format stores them twice."""

SIDE_NORM_EPS = 1e-5
"""Epsilon of the released SideNet's norms; its backbone has 1e-6 and no setting says so."""

_SIDE_NAMES = {
    r"decoder\.layers\.(\d+)\.self_attn\.memory_bias": r"memory_gate",
    r"decoder\.layers\.(\d+)\.self_attn\.([kvq]|out)_proj\.weight": r"layers.\1.attn.\2_proj.weight",
    r"decoder\.layers\.(\d+)\.fc1\.(weight|bias)": r"layers.\1.mlp.fc_in.\2",
    r"decoder\.layers\.(\d+)\.fc2\.(weight|bias)": r"layers.\1.mlp.fc_out.\2",
    r"decoder\.layers\.(\d+)\.ln_1\.(weight|bias)": r"layers.\1.ln_1.\2",
    r"decoder\.layer_norm\.(weight|bias)": r"final_norm.\1",
}

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
"""Ids 0 to 3 of every fairseq dictionary."""


def convert(
    checkpoint: str | Path,
    out: str | Path,
    backbone: str | Path | None = None,
    settings: str | Path | None = None,
    dtype: torch.dtype | None = None,
    vocabulary: str | Path | None = None,
) -> dict[str, Any]:
    """Convert a released checkpoint; a LongMem goes to ``out`` and its backbone to ``out/backbone``.

    Args:
        checkpoint: backbone or LongMem, ``.pt`` or ``.safetensors``.
        out: folder to write; it must not exist, or be empty.
        backbone: checkpoint of the backbone, for a LongMem file that holds none.
        settings: JSON with the settings of a ``.safetensors``.
        dtype: of the weights; None keeps the file's.
        vocabulary: folder of ``encoder.json``, ``vocab.bpe`` and ``dict.txt``, to write the tokenizer too.

    Returns:
        what was written: ``kind`` (``backbone`` or ``longmem``), ``out``, ``backbone`` (its folder; ``out`` for a
        backbone), ``parameters``, ``trained`` (those of the SideNet), ``dtype``, and ``ignored``: names of tensors that
        mean nothing to us.

    Raises:
        CheckpointError: a file is missing, damaged or foreign, or ``out`` is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is there already and not empty; choose another --out or remove it")
    read = read_fairseq(checkpoint, settings)
    if read.backbone and backbone is not None:
        raise CheckpointError(f"{checkpoint}: holds a backbone; --backbone is for a file with a SideNet alone")
    base = backbone_from_fairseq(read if backbone is None else read_fairseq(backbone), dtype)
    longmem = longmem_from_fairseq(read, base, dtype) if read.side else None
    place = out if longmem is None else out / "backbone"
    tokenizer = None  # made before anything is written: what does not fit leaves no folder behind
    if vocabulary is not None:
        tokenizer = tokenizer_from_fairseq(vocabulary, base.config.vocab_size, base.config.max_position_embeddings)
    base.save_pretrained(place)
    if longmem is not None:
        longmem.config.backbone_name_or_path = place.name  # relative: the folder can be moved
        longmem.save_pretrained(out)
    if tokenizer is not None:
        for folder in {out, place}:
            tokenizer.save_pretrained(str(folder))
    return {
        "kind": "backbone" if longmem is None else "longmem",
        "out": str(out),
        "backbone": str(place),
        "parameters": sum(each.numel() for each in (longmem or base).parameters()),
        "trained": sum(value.numel() for value in read.side.values()),
        "dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
        "ignored": read.ignored,
    }


# reading the file


@dataclass(frozen=True)
class FairseqCheckpoint:
    """A released checkpoint, taken apart.

    Attributes:
        settings: the ``model`` part of its ``cfg`` or ``args``, as plain values.
        backbone: the backbone's tensors under our names; empty where the file holds a SideNet alone.
        side: the SideNet's tensors under our names, without the ``sidenet.`` in front; empty for a backbone.
        augmented_layer: the SideNet layer whose gate the file holds; None for a backbone.
        ignored: names of tensors that mean nothing to us.
    """

    path: Path
    settings: dict[str, Any]
    backbone: dict[str, Tensor]
    side: dict[str, Tensor]
    augmented_layer: int | None
    ignored: list[str] = field(default_factory=list)

    def setting(self, *names: str, default: Any = None) -> Any:
        """The first of the settings that is there and is not None."""
        found = next((self.settings[name] for name in names if self.settings.get(name) is not None), default)
        if found is None:
            raise CheckpointError(f"{self.path}: its settings lack {' or '.join(names)}, which the tensors cannot tell")
        return found

    def number(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """The same as a whole number, from ``least`` on."""
        found = self.setting(*names, default=default)
        with suppress(TypeError, ValueError, OverflowError):
            if int(found) >= least:
                return int(found)
        raise CheckpointError(
            f"{self.path}: {' or '.join(names)} ({found!r}) in its settings must be a whole number from {least} on; "
            "name a JSON with the right one with --settings"
        )


def side_name(name: str) -> str | None:
    """Our name, behind ``sidenet.``, of a released SideNet tensor; None for any other."""
    return next(
        (re.sub(theirs, ours, name) for theirs, ours in _SIDE_NAMES.items() if re.fullmatch(theirs, name)), None
    )


def backbone_name(name: str) -> str | None:
    """Our name of a released backbone tensor; None for any other."""
    return next((name.removeprefix(prefix) for prefix in BACKBONE_PREFIXES if name.startswith(prefix)), None)


def read_fairseq(path: str | Path, settings: str | Path | None = None) -> FairseqCheckpoint:
    """Read a released checkpoint.

    Args:
        path: a ``.pt`` file, or a state dict in ``.safetensors``.
        settings: JSON with the settings of a ``.safetensors``; None is the ``.json`` of the same name beside it.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind.
    """
    path = Path(path)
    loaded, bare = _load(path), path.suffix == ".safetensors"
    tensors = loaded if bare else _plain(loaded).get("model")
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: has no 'model' entry with tensors, as a checkpoint of the released code has")
    known = _json_settings(path, settings) if bare or settings is not None else _settings_of(loaded)
    return _take_apart(path, {name: each for name, each in tensors.items() if isinstance(each, Tensor)}, known)


def _load(path: Path) -> Any:
    """What is in a file, on the CPU. Of classes, a pickle may name tensors' own and ``argparse.Namespace`` alone."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a checkpoint")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways in there
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"holds an object of {named[1]}, which is not loaded because it could run code"
            way_out = "save the checkpoint again with its 'model' and its 'cfg' as a plain dict alone"
            raise CheckpointError(f"{path}: {reason}; {way_out}") from error
        # torch then advises to load it without that safety
        reason = "torch.save has not written it" if "weights_only" in str(error) else first_line(error)[:200]
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({reason}); copy it again") from error


def _settings_of(loaded: dict[str, Any]) -> dict[str, Any]:
    """The ``model`` settings of ``cfg``, over the flat ``args`` of older files; each may be a namespace or a dict."""
    known: dict[str, Any] = {}
    for source in (loaded.get("args"), loaded.get("cfg")):
        values = _plain(source)
        for part in (values.get("task"), values.get("model", values)):
            known |= {key: value for key, value in _plain(part).items() if value is not None}
    return known


def _plain(value: Any) -> dict[str, Any]:
    value = vars(value) if isinstance(value, argparse.Namespace) else value
    return value if isinstance(value, dict) else {}


def _json_settings(path: Path, settings: str | Path | None) -> dict[str, Any]:
    settings = Path(settings or path.with_suffix(".json"))
    if not settings.is_file():
        raise CheckpointError(f"{path}: a state dict says nothing of heads and memory; name the JSON with --settings")
    try:
        known = json.loads(settings.read_text(encoding="utf-8"))
        return dict(known.get("config", known))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{settings}: cannot be read as JSON with settings ({error})") from error


def _take_apart(path: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> FairseqCheckpoint:
    backbone = {ours: value for name, value in tensors.items() if (ours := backbone_name(name)) is not None}
    side = {ours: value for name, value in tensors.items() if (ours := side_name(name)) is not None}
    gates = [int(name.split(".")[2]) for name in tensors if side_name(name) == "memory_gate"]
    known = {*SHARED, "decoder.version"}
    ignored = [name for name in tensors if name not in known and not backbone_name(name) and not side_name(name)]
    if not backbone and not side:
        raise CheckpointError(f"{path}: has neither a newgpt backbone nor a LongMem SideNet in it")
    return FairseqCheckpoint(path, settings, backbone, side, gates[0] if gates else None, ignored)


# its models


def backbone_from_fairseq(checkpoint: FairseqCheckpoint, dtype: torch.dtype | None = None) -> AlibiGPTForCausalLM:
    """The backbone in a released backbone or LongMem checkpoint, with weights of ``dtype``, or of the file's.

    Shapes come from the tensors; the settings say only what tensors cannot: heads and window.
    """
    tensors, number = checkpoint.backbone, checkpoint.number
    if "transformer.wte.weight" not in tensors:
        raise CheckpointError(f"{checkpoint.path}: holds no backbone; name its checkpoint with --backbone")
    if (mode := checkpoint.setting("newgpt_mode", default="alibi")) != "alibi":
        raise CheckpointError(
            f"{checkpoint.path}: newgpt_mode is {mode!r}; only 'alibi', the paper's backbone, can be converted"
        )
    embeddings, inner = tensors["transformer.wte.weight"], tensors.get("transformer.h.0.mlp.fc_in.bias")
    vocab, width = embeddings.shape
    heads = number("num_attention_heads", "decoder_attention_heads", "num_heads")
    if width % heads:
        raise CheckpointError(f"{checkpoint.path}: {heads} heads do not divide the width {width}")
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("transformer.h.")}
    config = AlibiGPTConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=max(layers, default=-1) + 1,
        num_attention_heads=heads,
        intermediate_size=None if inner is None else inner.shape[0],
        max_position_embeddings=number("tokens_per_sample", "max_target_positions", default=1024),
        bos_token_id=number("bos", default=0, least=0),
        pad_token_id=number("pad", default=1, least=0),
        eos_token_id=number("eos", default=2, least=0),
    )
    with torch.device("meta"):
        model = AlibiGPTForCausalLM(config)
    dtype = dtype or embeddings.dtype
    _load_tensors(checkpoint.path, model, {name: value.to(dtype) for name, value in tensors.items()}, assign=True)
    model.config.dtype = dtype
    model.train(False)
    return model


def longmem_from_fairseq(
    checkpoint: FairseqCheckpoint, backbone: AlibiGPTForCausalLM, dtype: torch.dtype | None = None
) -> LongMem:
    """The LongMem in a released checkpoint, over its backbone."""
    number, path = checkpoint.number, checkpoint.path
    memory_layer, stride = number("retrieval_layer_index", least=0), number("layer_reduction_factor")
    if memory_layer // stride != checkpoint.augmented_layer:
        raise CheckpointError(
            f"{path}: retrieval_layer_index {memory_layer} puts memory into SideNet layer {memory_layer // stride}, "
            f"but the gate is in layer {checkpoint.augmented_layer}"
        )
    chunk_size = number("chunk_size")
    config = LongMemConfig(
        backbone_config=backbone.config,
        memory_layers=(memory_layer,),
        stride=stride,
        chunk_size=chunk_size,
        num_retrieved=number("k"),
        # as many whole chunks as the released code makes room for
        memory_size=number("memory_size", default=65536) // chunk_size * chunk_size,
        final_state="normed",
        side_activation=str(checkpoint.setting("activation_fn", default="gelu")),
        side_norm_eps=SIDE_NORM_EPS,
    )
    model = LongMem(config, backbone)
    model.sidenet.to(dtype or next(iter(checkpoint.side.values())).dtype)
    _load_tensors(path, model.sidenet, checkpoint.side)
    model.train(False)
    return model


def _load_tensors(path: Path, model: nn.Module, tensors: dict[str, Tensor], *, assign: bool = False) -> None:
    """``load_state_dict``; what is missing, foreign or of another shape is one line."""
    try:
        model.load_state_dict(tensors, assign=assign)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: has other tensors ({' '.join(str(error).split())[:400]})") from error


# its vocabulary


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
