"""Checkpoints of the released code (fairseq), read without fairseq and without running anything that is in them.

A fairseq file is one ``torch.save`` dict: ``cfg`` (or ``args``) with the settings, ``model`` with the tensors. Two
kinds are known: the backbone ``newgpt`` and LongMem, which holds its whole backbone. A bare state dict in safetensors
with its settings in a JSON file beside it is read as well.

No sign is turned: the released code's ``memory_bias`` already weighs memory, as ``memory_gate`` does, although the
paper writes the gate the other way round.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from longmem.config import LongMemConfig
from longmem.errors import CheckpointError, first_line
from longmem.modeling.alibi_gpt import AlibiGPTConfig, AlibiGPTForCausalLM

BACKBONE_PREFIXES = ("decoder.pretrained_model.decoder.model.", "decoder.model.")
"""Prefixes of the backbone's tensors inside a LongMem file, and in a file of the backbone alone."""

SHARED = {"decoder.embed_tokens.weight": "transformer.wte.weight", "decoder.output_projection.weight": "lm_head.weight"}
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
        settings: JSON with the settings of a ``.safetensors``; None looks for the longest ``*.json`` beside it whose
            name begins the file's.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind.
    """
    path = Path(path)
    loaded, bare = _load(path), path.suffix == ".safetensors"
    tensors = loaded if bare else loaded.get("model")
    if not isinstance(tensors, dict) or not tensors:
        there = ", ".join(map(str, loaded)) or "nothing"
        raise CheckpointError(f"{path}: has no 'model' entry with tensors; it has {there}")
    known = _json_settings(path, settings) if bare or settings is not None else _settings_of(loaded)
    return _take_apart(path, {name: each for name, each in tensors.items() if isinstance(each, Tensor)}, known)


def _load(path: Path) -> dict[str, Any]:
    """The dict in a file, on the CPU. Of classes, a pickle may name tensors' own and ``argparse.Namespace`` alone."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a checkpoint")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file fails in many ways in there
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"holds an object of {named[1]}, which is not loaded because it could run code"
            way_out = "save the checkpoint again with its 'model' and its 'cfg' as a plain dict alone"
            raise CheckpointError(f"{path}: {reason}; {way_out}") from error
        # torch then advises to load it without that safety
        reason = "torch.save has not written it" if "weights_only" in str(error) else first_line(error)[:200]
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({reason}); copy it again") from error
    if not isinstance(loaded, dict):
        kind = type(loaded).__name__
        raise CheckpointError(f"{path}: holds a {kind} where a checkpoint is a dict with a 'model' entry")
    return loaded


def backbone_from_fairseq(
    checkpoint: FairseqCheckpoint | str | Path, dtype: torch.dtype | None = None
) -> AlibiGPTForCausalLM:
    """The backbone in a released backbone or LongMem checkpoint, with weights of ``dtype``, or of the file's."""
    if not isinstance(checkpoint, FairseqCheckpoint):
        checkpoint = read_fairseq(checkpoint)
    config = backbone_config(checkpoint)
    with torch.device("meta"):
        model = AlibiGPTForCausalLM(config)
    dtype = dtype or checkpoint.backbone["transformer.wte.weight"].dtype
    tensors = {name: value.to(dtype) for name, value in checkpoint.backbone.items()}
    load_tensors(checkpoint.path, model, tensors, assign=True)
    model.config.dtype = dtype
    model.train(False)
    return model


def backbone_config(checkpoint: FairseqCheckpoint) -> AlibiGPTConfig:
    """Shapes come from the tensors; the settings say only what tensors cannot: heads and window."""
    tensors, setting = checkpoint.backbone, checkpoint.setting
    if "transformer.wte.weight" not in tensors:
        raise CheckpointError(f"{checkpoint.path}: holds no backbone; name its checkpoint with --backbone")
    if (mode := setting("newgpt_mode", default="alibi")) != "alibi":
        raise CheckpointError(
            f"{checkpoint.path}: newgpt_mode is {mode!r}; only 'alibi', the paper's backbone, can be converted"
        )
    vocab, width = tensors["transformer.wte.weight"].shape
    heads = int(setting("num_attention_heads", "decoder_attention_heads", "num_heads"))
    if heads < 1 or width % heads:
        raise CheckpointError(f"{checkpoint.path}: {heads} heads do not divide the width {width}")
    inner = tensors.get("transformer.h.0.mlp.fc_in.bias")
    return AlibiGPTConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=_count(tensors, r"transformer\.h\.(\d+)\."),
        num_attention_heads=heads,
        intermediate_size=None if inner is None else inner.shape[0],
        max_position_embeddings=int(setting("tokens_per_sample", "max_target_positions", default=1024)),
        bos_token_id=int(setting("bos", default=0)),
        pad_token_id=int(setting("pad", default=1)),
        eos_token_id=int(setting("eos", default=2)),
    )


def longmem_config(checkpoint: FairseqCheckpoint, backbone: AlibiGPTConfig) -> LongMemConfig:
    """The released SideNet's shape, activation, norms and memory layer."""
    setting, path = checkpoint.setting, checkpoint.path
    memory_layer, stride = int(setting("retrieval_layer_index")), int(setting("layer_reduction_factor"))
    side_layers = _count(checkpoint.side, r"layers\.(\d+)\.")
    if stride < 1 or side_layers * stride != backbone.num_hidden_layers:
        raise CheckpointError(
            f"{path}: {side_layers} SideNet layers with layer_reduction_factor {stride} do not fit a backbone of "
            f"{backbone.num_hidden_layers} layers"
        )
    if memory_layer // stride != checkpoint.augmented_layer:
        raise CheckpointError(
            f"{path}: retrieval_layer_index {memory_layer} puts memory into SideNet layer {memory_layer // stride}, "
            f"but the gate is in layer {checkpoint.augmented_layer}"
        )
    chunk_size = int(setting("chunk_size"))
    return LongMemConfig(
        backbone_config=backbone,
        memory_layers=(memory_layer,),
        stride=stride,
        chunk_size=chunk_size,
        num_retrieved=int(setting("k")),
        # as many whole chunks as the released code makes room for
        memory_size=int(setting("memory_size", default=65536)) // chunk_size * chunk_size,
        final_state="normed",
        side_activation=str(setting("activation_fn", default="gelu")),
        side_norm_eps=SIDE_NORM_EPS,
    )


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
    beside = [found for found in path.parent.glob("*.json") if path.name.startswith(found.stem)]
    if settings is None and not beside:
        raise CheckpointError(f"{path}: a state dict says nothing of heads and memory; name the JSON with --settings")
    settings = settings or max(beside, key=lambda found: len(found.stem))
    try:
        known = json.loads(Path(settings).read_text(encoding="utf-8"))
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
    for name, ours in SHARED.items():
        if name in tensors and ours in backbone and not torch.equal(tensors[name], backbone[ours]):
            raise CheckpointError(f"{path}: {name} differs from the backbone's {ours}; the two should be one tensor")
    if side and len(gates) != 1:
        raise CheckpointError(f"{path}: has {len(gates)} memory gates (self_attn.memory_bias) where LongMem has one")
    return FairseqCheckpoint(path, settings, backbone, side, gates[0] if gates else None, ignored)


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    return max((int(found[1]) for name in tensors if (found := re.match(pattern, name))), default=-1) + 1


def load_tensors(path: Path, model: nn.Module, tensors: dict[str, Tensor], *, assign: bool = False) -> None:
    """``load_state_dict``; what is missing, foreign or of another shape is one line."""
    try:
        model.load_state_dict(tensors, assign=assign)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: has other tensors ({' '.join(str(error).split())[:400]})") from error
