"""What a training run needs: GPU memory and hours, by arithmetic that can be checked by hand.

Parameters are counted on the real architecture, built without memory (torch's meta device). Everything else follows
from shapes: FLOPs from the matrices that a token passes, bytes from the tensors that are alive at the peak. What no
shape tells (kernels' workspaces, the share of peak FLOPs that is reached) is an assumption, named in ``Hardware`` and
``RESERVE``.

One FLOP is one addition or one multiplication: a matrix of P weights costs a token 2P forward, and twice that backward
where both inputs and weights need gradients. Attention is counted over the whole segment, not its causal half, because
kernels that take a mask compute all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from longmem.config import LongMemConfig, MemTRMConfig
from longmem.errors import ConfigError
from longmem.memory.index import SCORES_AT_ONCE
from longmem.modeling.families import Family, side_sources

if TYPE_CHECKING:
    from longmem.training.recipe import Recipe

GIB = 1 << 30
MIB = 1 << 20
RESERVE = 1 * GIB
"""The CUDA context, kernels' workspaces and what the allocator cannot use."""
ADAM_BYTES = 8
"""Two float32 moments per trained parameter."""
KEY_BYTES = 4
"""Chunk keys are kept in float32."""


@dataclass(frozen=True)
class Hardware:
    """One machine.

    Attributes:
        name: what it is called.
        memory: bytes per device.
        flops: dense peak per device and second in half precision.
        flops_single: the same in float32.
        bandwidth: bytes per device and second, of its memory.
        devices: how many.
        utilisation: share of the peak that training reaches; 0.35 to 0.5 is usual for models of this size.
        bf16: whether it multiplies in bf16, so that a recipe's ``precision = "auto"`` takes it.
    """

    name: str
    memory: int
    flops: float
    flops_single: float
    bandwidth: float
    devices: int = 1
    utilisation: float = 0.4
    bf16: bool = True


HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("2-cpu-cores", 16 * GIB, 0.19e12, 0.19e12, 20e9, bf16=False),
        Hardware("rtx-4090", 24 * GIB, 165e12, 83e12, 1.0e12),
        Hardware("v100-32gb", 32 * GIB, 125e12, 15.7e12, 0.9e12, bf16=False),
        Hardware("16x-v100-32gb", 32 * GIB, 125e12, 15.7e12, 0.9e12, devices=16, bf16=False),
        Hardware("a100-80gb", 80 * GIB, 312e12, 19.5e12, 2.0e12),
        Hardware("8x-a100-80gb", 80 * GIB, 312e12, 19.5e12, 2.0e12, devices=8),
        Hardware("h100-80gb", 80 * GIB, 989e12, 67e12, 3.35e12),
        Hardware("8x-h100-80gb", 80 * GIB, 989e12, 67e12, 3.35e12, devices=8),
    )
}
"""Vendors' figures: dense half precision (fp16 on V100, else bf16) with float32 accumulation, and float32 without
TF32. The CPU: two cores that finish 32 float32 operations per clock of 3 GHz."""


@dataclass(frozen=True)
class Work:
    """What is done with a model.

    Attributes:
        rows: segments per device and forward pass.
        segment: T, tokens of a segment.
        tokens: of the whole run, over all devices.
        trained_bytes: of a trained weight and of its gradient (float32 master weights: 4).
        frozen_bytes: of a frozen weight.
        compute_bytes: of an activation (bf16: 2).
        bank_bytes: of a remembered number.
        memory: tokens a row remembers when full; 0 trains without memory.
        banks: how many banks of that size a device holds; None is one for every row.
        gradient_checkpointing: keep only the trained layers' inputs for backward.
    """

    rows: int
    segment: int
    tokens: int
    memory: int = 0
    trained_bytes: int = 4
    frozen_bytes: int = 2
    compute_bytes: int = 2
    bank_bytes: int = 2
    banks: int | None = None
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model that cost is made of.

    Attributes:
        parameters: of the backbone, shared tensors once.
        layers: parameters of each decoder layer.
        active: of each decoder layer, the parameters that a token passes (fewer in a mixture of experts).
        norm: of the final norm.
        head: weights of the LM head, tied or not.
        width: C.
        inner: width of the feed-forward, as one token sees it.
        gated: the feed-forward has a gate beside its input projection.
        heads: H.
        heads_kv: Hkv.
        head_dim: D.
        vocab: V.
        masked: attention gets a (T, T) float mask per head (ALiBi).
    """

    parameters: int
    layers: tuple[int, ...]
    active: tuple[int, ...]
    norm: int
    head: int
    width: int
    inner: int
    gated: bool
    heads: int
    heads_kv: int
    head_dim: int
    vocab: int
    masked: bool

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Sizes:
        """Build the architecture on the meta device and count.

        Raises:
            BackboneError: a family that is not supported.
        """
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return cls.of_model(model)

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Sizes:
        """Count a model that exists."""
        family = Family.of(model)
        text = family.config
        heads = int(text.num_attention_heads)
        width = int(text.hidden_size)
        layers = tuple(_count(layer) for layer in family.layers)
        experts, chosen = getattr(text, "num_local_experts", None), getattr(text, "num_experts_per_tok", None)
        active = layers
        inner = int(_first(text, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size") or 4 * width)
        if experts and chosen:
            active = tuple(_active(layer, experts, chosen) for layer in family.layers)
            inner *= chosen
        head = model.get_output_embeddings()
        return cls(
            parameters=_count(model),
            layers=layers,
            active=active,
            norm=0 if family.final_norm is None else _count(family.final_norm),
            head=int(text.vocab_size) * width if head is None else sum(p.numel() for p in head.parameters()),
            width=width,
            inner=inner,
            gated=any("gate" in name for name, _ in family.layers[0].named_parameters()),
            heads=heads,
            heads_kv=_kv_heads(text, heads),
            head_dim=int(getattr(text, "head_dim", None) or width // heads),
            vocab=int(text.vocab_size),
            masked=text.model_type in ("alibi_gpt", "bloom", "mpt") or bool(getattr(text, "alibi", False)),
        )

    @property
    def attention(self) -> int:
        """Weights of one layer's four attention projections."""
        return self.width * self.head_dim * (2 * self.heads + 2 * self.heads_kv)


@dataclass(frozen=True)
class Estimate:
    """What a run needs on a machine.

    Attributes:
        parameters: of the backbone.
        trained: parameters that training changes.
        bytes: of every part that is alive at the peak, per device.
        flops: per token, of every part.
        reads: bytes per token that retrieval moves.
        work: what is done.
        hardware: where.
    """

    parameters: int
    trained: int
    bytes: dict[str, int]
    flops: dict[str, float]
    reads: float
    work: Work
    hardware: Hardware

    @cached_property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.hardware.memory

    @property
    def peak(self) -> float:
        """FLOPs per device and second in the precision of the work."""
        return self.hardware.flops if self.work.compute_bytes == 2 else self.hardware.flops_single

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together; retrieval waits for memory, everything else for arithmetic."""
        machine = self.hardware
        seconds = sum(self.flops.values()) / (self.peak * machine.utilisation) + self.reads / machine.bandwidth
        return machine.devices / seconds

    @property
    def hours(self) -> float:
        return self.work.tokens / self.tokens_per_second / 3600

    def lines(self) -> list[str]:
        """The estimate in words, for the terminal and for recipes' headers."""
        machine, peak = self.hardware, self.peak * self.hardware.devices / 1e12
        memory = ", ".join(f"{name} {_size(count)}" for name, count in self.bytes.items() if count)
        speed = f"{self.tokens_per_second:,.0f} tokens/s at {machine.utilisation:.0%} of {peak:,.4g} TFLOP/s"
        verdict = "fits" if self.fits else "DOES NOT FIT"
        work = ", ".join(f"{name} {count / 1e9:.2f}" for name, count in self.flops.items() if count)
        return [
            f"parameters: {self.parameters:,} in the backbone, {self.trained:,} trained",
            f"memory per device: {_size(self.total_bytes)} of {_size(machine.memory)}, {verdict} ({memory})",
            f"work per token: {sum(self.flops.values()) / 1e9:.2f} GFLOP ({work}); retrieval moves {_size(self.reads)}",
            f"time on {machine.name}: {_hours(self.hours)} for {self.work.tokens:,} tokens, {speed}",
        ]


def estimate(what: Recipe | tuple[PreTrainedConfig, Work], hardware: Hardware | str) -> Estimate:
    """Memory and hours of a recipe, or of a config and the work to be done with it.

    Args:
        what: a recipe; or a config (``LongMemConfig``: adaptation; ``MemTRMConfig``: the backbone trained with its
            memory; a backbone's: pre-training) and a ``Work``.
        hardware: a machine, or the name of one in ``HARDWARE``.

    Raises:
        ConfigError: unknown hardware, or a recipe without a budget in steps or tokens.
        BackboneError: a family that is not supported.
    """
    if isinstance(hardware, str):
        if hardware not in HARDWARE:
            raise ConfigError(f"hardware ({hardware!r}) is not known; try one of {', '.join(HARDWARE)}")
        hardware = HARDWARE[hardware]
    config, work = what if isinstance(what, tuple) else _plan(what, hardware)
    if isinstance(config, LongMemConfig | MemTRMConfig):
        if config.backbone_config is None:
            raise ConfigError("backbone_config is missing; nothing can be said of a model without its backbone")
        sizes = Sizes.of(config.backbone_config)
        if isinstance(config, MemTRMConfig):
            return coupled(sizes, config, work, hardware)
        return adaptation(sizes, config, work, hardware)
    return pretraining(Sizes.of(config), work, hardware)


def adaptation(sizes: Sizes, config: LongMemConfig, work: Work, hardware: Hardware) -> Estimate:
    """A SideNet over a frozen backbone."""
    sources = side_sources(len(sizes.layers), config.stride)
    trained = sum(sizes.layers[source] for source in sources) + sizes.norm + sizes.heads
    memory = work.memory
    side = sum(sizes.active[source] for source in sources)
    local = 4 * work.segment * sizes.heads * sizes.head_dim
    search = 2 * sizes.heads * sizes.head_dim * (memory // config.chunk_size)
    reading = 4 * config.num_retrieved * sizes.heads * sizes.head_dim if memory else 0
    flops = {
        # the probe repeats one layer's projections, here and in the SideNet
        "backbone": 2.0 * (sum(sizes.active) + sizes.attention) + len(sizes.layers) * local,
        "head": 2.0 * 2 * sizes.head,  # forward, and backward to its input: it is frozen
        "SideNet": 3.0 * (2 * side + len(sources) * local) + (2.0 * 3 * sizes.attention if memory else 0),
        "search": float(search),
        "memory attention": 3.0 * reading,
    }
    if work.gradient_checkpointing:
        flops["SideNet"] *= 4 / 3
        flops["search"] *= 2  # the recomputation searches again
    positions = work.rows * work.segment
    parts = {
        "backbone": sizes.parameters * work.frozen_bytes,
        **_trained_bytes(trained, work),
        "residual states": (len(sources) + 2) * positions * sizes.width * work.compute_bytes,
        "activations": _activations(sizes, len(sources), work),
        "logits": _logits(sizes, work),
        "mask": _mask(sizes, work),
        "bank": bank_bytes(sizes, config.chunk_size, work),
        "search scratch": SCORES_AT_ONCE["gpu"] * 4 if memory else 0,
        "reserve": RESERVE,
    }
    return Estimate(sizes.parameters, trained, parts, flops, _reads(sizes, config, work), work, hardware)


def pretraining(sizes: Sizes, work: Work, hardware: Hardware) -> Estimate:
    """All of a backbone from scratch."""
    local = 4 * work.segment * sizes.heads * sizes.head_dim
    again = 4 if work.gradient_checkpointing else 3
    layers = len(sizes.layers)
    flops = {
        "layers": float(again) * (2 * sum(sizes.active) + layers * local),
        "head": 3.0 * 2 * sizes.head,
    }
    parts = {
        **_trained_bytes(sizes.parameters, work),
        "activations": _activations(sizes, layers, work),
        "logits": _logits(sizes, work),
        "mask": _mask(sizes, work),
        "reserve": RESERVE,
    }
    return Estimate(sizes.parameters, sizes.parameters, parts, flops, 0.0, work, hardware)


def coupled(sizes: Sizes, config: MemTRMConfig, work: Work, hardware: Hardware) -> Estimate:
    """All of a backbone, while one of its layers reads memory; that layer is never recomputed, nor is its search."""
    plain, memory = pretraining(sizes, work, hardware), work.memory
    local = 4 * work.segment * sizes.heads * sizes.head_dim
    again = 2 * sizes.active[0] + local if work.gradient_checkpointing else 0
    flops = {
        **plain.flops,
        "layers": plain.flops["layers"] - again,
        "probe": 2.0 * 3 * sizes.attention,
        "search": 2.0 * sizes.heads * sizes.head_dim * (memory // config.chunk_size),
        "memory attention": 3.0 * 4 * config.num_retrieved * sizes.heads * sizes.head_dim if memory else 0.0,
    }
    parts = {
        **plain.bytes,
        **_trained_bytes(sizes.parameters + sizes.heads, work),
        "bank": bank_bytes(sizes, config.chunk_size, work),
        "search scratch": SCORES_AT_ONCE["gpu"] * 4 if memory else 0,
    }
    reads = _reads(sizes, config, replace(work, gradient_checkpointing=False))
    return Estimate(sizes.parameters, sizes.parameters + sizes.heads, parts, flops, reads, work, hardware)


def bank_bytes(sizes: Sizes, chunk_size: int, work: Work) -> int:
    """Keys, values and chunk keys of the banks of one device."""
    numbers = sizes.heads_kv * sizes.head_dim
    one = work.memory * numbers * 2 * work.bank_bytes + work.memory // chunk_size * numbers * KEY_BYTES
    return one * (work.rows if work.banks is None else work.banks)


def _trained_bytes(trained: int, work: Work) -> dict[str, int]:
    copies = work.compute_bytes if work.compute_bytes < work.trained_bytes else 0  # autocast keeps a cast copy
    return {
        "trained weights": trained * (work.trained_bytes + copies),
        "gradients": trained * work.trained_bytes,
        "optimiser": trained * ADAM_BYTES,
    }


def _activations(sizes: Sizes, layers: int, work: Work) -> int:
    """What backward needs of the trained layers, with an attention kernel that keeps no scores.

    Per token and layer: the layer's input and the norm's output, queries, keys, values, the attention's output; the
    feed-forward's input projection before and after its activation, and its gate where it has one.
    """
    attention = sizes.head_dim * (2 * sizes.heads + 2 * sizes.heads_kv)
    one = 2 * sizes.width + attention + sizes.inner * (3 if sizes.gated else 2)
    kept = layers * sizes.width + one if work.gradient_checkpointing else layers * one
    return work.rows * work.segment * kept * work.compute_bytes


def _logits(sizes: Sizes, work: Work) -> int:
    """Logits as computed, in float32 for the loss, and their gradient in both."""
    return work.rows * work.segment * sizes.vocab * 2 * (work.compute_bytes + 4)


def _mask(sizes: Sizes, work: Work) -> int:
    """ALiBi with the causal rule, float32 and as computed; one for all rows that have no padding."""
    return sizes.heads * work.segment**2 * (4 + work.compute_bytes) if sizes.masked else 0


def _reads(sizes: Sizes, config: LongMemConfig | MemTRMConfig, work: Work) -> float:
    """Bytes per token that retrieval moves.

    Search writes and reads a score for every head and chunk, and reads all chunk keys once for every block of queries;
    what is found, K keys and values per head, is read forward and backward.
    """
    if not work.memory:
        return 0.0
    chunks = work.memory // config.chunk_size
    scores = sizes.heads * chunks
    table = sizes.heads_kv * chunks * sizes.head_dim * KEY_BYTES
    queries_per_block = min(work.segment, max(1, SCORES_AT_ONCE["gpu"] // scores))
    searched = 2 * 4 * scores + table / queries_per_block
    if work.gradient_checkpointing:
        searched *= 2
    found = sizes.heads * config.num_retrieved * sizes.head_dim * 2 * work.bank_bytes
    return searched + 2.0 * found


def _plan(recipe: Recipe, hardware: Hardware) -> tuple[PreTrainedConfig, Work]:
    """The config and the work that a recipe describes."""
    optim = recipe.optim
    half = hardware.bf16 if optim.precision == "auto" else optim.precision == "bf16"
    step = optim.rows * optim.accumulate * recipe.data.window * hardware.devices
    tokens = optim.tokens if optim.tokens is not None else optim.steps and optim.steps * step
    if tokens is None:
        raise ConfigError("optim.tokens and optim.steps are both missing; an estimate needs one of them")
    work: dict[str, Any] = {
        "rows": optim.rows,
        "segment": recipe.data.window,
        "tokens": tokens,
        "compute_bytes": 2 if half else 4,
        "gradient_checkpointing": optim.gradient_checkpointing,
    }
    if recipe.task == "pretrain":
        return _pretrained_config(recipe), Work(**work)
    side = recipe.sidenet
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    stored = recipe.backbone.dtype
    shape: dict[str, Any] = {
        "backbone_config": _backbone_config(recipe),
        "memory_layer": None if side.memory_layer == "auto" else side.memory_layer,
        **{name: getattr(side, name) for name in ("chunk_size", "num_retrieved", "memory_size")},
    }
    coupled_memory = recipe.method == "memtrm"
    config = MemTRMConfig(**shape) if coupled_memory else LongMemConfig(**shape, stride=side.stride)
    return config, Work(
        **work,
        memory=side.memory_size if side.memory else 0,
        frozen_bytes=sizes.get(stored or "", 2 if half else 4),
        bank_bytes=sizes[side.memory_dtype or ("bfloat16" if half else "float32")],
        banks=1 if side.shared else None,
    )


def _pretrained_config(recipe: Recipe) -> PreTrainedConfig:
    from transformers import AutoConfig

    from longmem.modeling.alibi_gpt import AlibiGPTConfig

    model, data = recipe.model, recipe.data
    if model.init is not None:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model.init)
        return config
    return AlibiGPTConfig(
        vocab_size=model.vocab_size or data.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        intermediate_size=model.intermediate_size,
        activation=model.activation,
        layer_norm_epsilon=model.layer_norm_epsilon,
        max_position_embeddings=data.window,
    )


def _backbone_config(recipe: Recipe) -> PreTrainedConfig:
    from transformers import AutoConfig

    path = str(recipe.backbone.path)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, revision=recipe.backbone.revision or "main")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"backbone.path ({path}) cannot be read ({reason}); an estimate needs its config.json"
        ) from error
    return config


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _active(layer: nn.Module, experts: int, chosen: int) -> int:
    """Parameters of a layer that one token passes: its experts' share of theirs."""
    inside = sum(parameter.numel() for name, parameter in layer.named_parameters() if ".experts." in name)
    return _count(layer) - inside + inside * chosen // experts


def _kv_heads(text: Any, heads: int) -> int:
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    return int(_first(text, "num_key_value_heads", "num_kv_heads", "n_head_kv") or heads)


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _size(count: float) -> str:
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / 1024:.1f} KiB"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 100 else f"{hours:,.0f} hours ({hours / 24:,.0f} days)"
