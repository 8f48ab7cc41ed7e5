"""What a run needs, before it begins: memory of a device, hours, device-hours. Arithmetic over shapes, good to a fifth.

Parameters are counted on the real models, built on torch's meta device. One FLOP is one addition or one
multiplication: a matrix of P weights costs a token 2P forward and twice that backward where inputs and weights need
gradients. Attention is counted over the whole segment, because kernels that take a mask compute all of it. What no
shape tells is an assumption: ``RESERVE``, and the share of its peak that a device reaches.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from longmem.config import LongMemConfig
from longmem.errors import ConfigError, first_line
from longmem.modeling.families import Family
from longmem.modeling.longmem import LongMem
from longmem.progress import clock
from longmem.training.models import backbone_shape
from longmem.training.recipe import Recipe

GIB = 1 << 30
RESERVE = 1 * GIB
"""The CUDA context, kernels' workspaces and what the allocator cannot use."""
REACHED = 0.4
"""Share of the peak that training reaches; 0.35 to 0.5 is usual for models of this size."""


class Device(NamedTuple):
    """GiB of memory, dense peaks in TFLOP/s, bandwidth of memory in TB/s, and whether it multiplies in bf16, so that a
    recipe's ``precision = "auto"`` takes it."""

    memory: int
    half: float
    single: float
    bandwidth: float
    bf16: bool = True


HARDWARE = {
    "2-cpu-cores": Device(16, 0.19, 0.19, 0.02, bf16=False),
    "rtx-4090": Device(24, 165, 83, 1.0),
    "v100-32gb": Device(32, 125, 15.7, 0.9, bf16=False),
    "a100-80gb": Device(80, 312, 19.5, 2.0),
    "h100-80gb": Device(80, 989, 67, 3.35),
}
"""Vendors' figures: dense half precision (fp16 on V100, else bf16) with float32 accumulation, and float32 without
TF32. The CPU: two cores that finish 32 float32 operations per clock of 3 GHz."""


class Estimate(NamedTuple):
    """What a run needs on a machine.

    Attributes:
        parameters: of the backbone; ``trained`` are those that training changes.
        tokens: of the whole run.
        bytes: of every part that is alive at the peak, per device.
        flops: per token, of every part.
        seconds: per token and device.
    """

    machine: str
    device: Device
    devices: int
    parameters: int
    trained: int
    tokens: int
    bytes: dict[str, float]
    flops: dict[str, float]
    seconds: float

    @property
    def gib(self) -> float:
        return sum(self.bytes.values()) / GIB

    @property
    def hours(self) -> float:
        return self.tokens * self.seconds / self.devices / 3600

    @property
    def fits(self) -> bool:
        return self.gib <= self.device.memory

    def lines(self) -> list[str]:
        """The estimate as a table."""
        parts = ", ".join(f"{name} {count / GIB:.2f}" for name, count in self.bytes.items() if count)
        work = ", ".join(f"{name} {count / 1e9:.2f}" for name, count in self.flops.items() if count)
        fits = "fits" if self.fits else "DOES NOT FIT"
        return [
            f"parameters  {self.parameters:,} in the backbone, {self.trained:,} trained",
            f"memory      {self.gib:.2f} of {self.device.memory} GiB per device, {fits} ({parts})",
            f"work        {sum(self.flops.values()) / 1e9:.2f} GFLOP a token ({work})",
            f"time        {clock(3600 * self.hours)} on {self.machine} for {self.tokens:,} tokens",
            f"speed       {self.devices / self.seconds:,.0f} tokens/s at {REACHED:.0%} of the peak",
            f"cost        {self.hours * self.devices:,.1f} device-hours",
        ]


def estimate(recipe: Recipe, machine: str, backbone: PreTrainedConfig | None = None) -> Estimate:
    """Memory and hours of a recipe on a device of ``HARDWARE``, or on several, as ``8x-a100-80gb``.

    FSDP2 is counted as weights, gradients and moments divided among the devices; what moves between them is not.
    ``backbone`` is in place of ``backbone.path``.
    """
    several = re.match(r"([1-9]\d*)x-", machine)
    name, devices = (machine[several.end() :], int(several[1])) if several else (machine, 1)
    if name not in HARDWARE:
        raise ConfigError(f"hardware ({machine!r}) is not known; try one of {', '.join(HARDWARE)}, 8x-a100-80gb")
    hardware = HARDWARE[name]
    optim, side, window = recipe.optim, recipe.sidenet, recipe.data.window
    tokens = optim.tokens or (optim.steps or 0) * optim.rows * optim.accumulate * window * devices
    if not tokens:
        raise ConfigError("optim.tokens and optim.steps are both missing; an estimate needs one of them")
    half = hardware.bf16 if optim.precision == "auto" else optim.precision == "bf16"
    number = 2 if half else 4  # bytes of what is computed
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(backbone or _config(recipe))
    family = Family.of(model)
    text: Any = family.config
    total, width, vocab = _count(model), int(text.hidden_size), int(text.vocab_size)
    heads, heads_kv, dim = int(text.num_attention_heads), family.kv_heads(0), family.head_dim(0)
    inner = int(getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * width)
    gated = any("gate" in name for name, _ in family.layers[0].named_parameters())
    active = [_active(layer, text) for layer in family.layers]
    frozen = recipe.task == "adapt" and recipe.method == "longmem"
    chosen, trained, share, reading = list(range(len(active))), total, 1.0, 1
    if isinstance(side.memory_layers, tuple):
        reading = len(side.memory_layers)
    if frozen:
        measured = {"memory_layers": None} if side.memory_layers == "auto" else {}
        config = LongMemConfig(backbone_config=model.config, **recipe.model_settings | measured)
        sidenet = LongMem(config, model, fingerprint="not needed").sidenet
        chosen, trained = sidenet.sources, sum(p.numel() for p in sidenet.parameters() if p.requires_grad)
        # of the weights of its layers, those that have gradients: all, or the attention's
        share = min(1.0, trained / sum(_count(family.layers[i]) for i in chosen))
    memory = side.memory_size if recipe.task == "adapt" and side.memory else 0

    attention, local = width * dim * 2 * (heads + heads_kv), 4 * window * heads * dim
    again = 1 if optim.gradient_checkpointing else 0
    weights = 2.0 * sum(active[i] for i in chosen)
    flops = {
        "backbone": 2.0 * (sum(active) + attention) + len(active) * local if frozen else 0.0,
        "trained layers": (2 + share + again) * weights + (3 + again) * len(chosen) * local,
        "head": (2 if frozen else 3) * 2.0 * vocab * width,
        "search": (1 + again) * 2.0 * reading * heads * dim * (memory // side.chunk_size),
        "memory attention": reading * (12.0 * side.num_retrieved * heads * dim + 6 * attention) if memory else 0.0,
    }
    # a score of each head and chunk is written and read; keys and values that were found are read twice
    moved = 8 * heads * memory // side.chunk_size + 4 * heads * side.num_retrieved * dim * number if memory else 0
    seconds = sum(flops.values()) / ((hardware.half if half else hardware.single) * 1e12 * REACHED)
    seconds += reading * moved / (hardware.bandwidth * 1e12)

    world = devices if optim.parallel == "fsdp" else 1
    positions, kept = optim.rows * window, {"8bit": 1.0, "4bit": 0.53}.get(recipe.backbone.quantised or "")
    stored = {"float32": 4, "bfloat16": 2, "float16": 2}
    one = 2 * width + 2 * dim * (heads + heads_kv) + inner * (3 if gated else 2)
    states = len(chosen) * width + one if optim.gradient_checkpointing else len(chosen) * one
    remembered = stored[side.memory_dtype or ("bfloat16" if half else "float32")]
    bank = optim.rows * memory * heads_kv * dim * reading * (2 * remembered + 4 / side.chunk_size)
    sizes = {
        "backbone": total * (kept or stored.get(recipe.backbone.dtype or "", number)) / world if frozen else 0,
        # autocast keeps a cast copy of float32 weights; gradients and two moments are float32
        "trained weights": trained * ((6 if half and world == 1 else 4) + 4 + 8) / world,
        "activations": positions * (states + (len(chosen) + 2) * width) * number,
        # as computed and in float32 for the loss, and their gradients
        "logits": positions * vocab * 2 * (number + 4),
        "bank": bank,
        "reserve": RESERVE,
    }
    return Estimate(machine, hardware, devices, total, trained, tokens, sizes, flops, seconds)


def _config(recipe: Recipe) -> PreTrainedConfig:
    if recipe.task == "pretrain":
        return backbone_shape(recipe)
    path = str(recipe.backbone.path)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, revision=recipe.backbone.revision or "main")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({first_line(error)}); an estimate needs its config.json") from error
    return config


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _active(layer: torch.nn.Module, text: Any) -> int:
    """Parameters of a layer that one token passes: of experts, its share."""
    experts, chosen = getattr(text, "num_local_experts", None), getattr(text, "num_experts_per_tok", None)
    if not experts or not chosen:
        return _count(layer)
    inside = sum(parameter.numel() for name, parameter in layer.named_parameters() if ".experts." in name)
    return _count(layer) - inside + inside * int(chosen) // int(experts)
