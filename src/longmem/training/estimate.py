"""What a training run needs: GPU memory and hours, by arithmetic that can be checked by hand.

Parameters are counted on the real architecture (``sizes``). All else follows from shapes: FLOPs from the matrices
that a token passes, bytes from the tensors that are alive at the peak. What no shape tells (kernels' workspaces, the
share of peak FLOPs that is reached) is an assumption, named in ``Hardware`` and ``RESERVE``.

One FLOP is one addition or one multiplication: a matrix of P weights costs a token 2P forward, and twice that backward
where both inputs and weights need gradients. Attention is counted over the whole segment, not its causal half, because
kernels that take a mask compute all of it.

Devices hold the same under DDP; under FSDP2 their part of weights, gradients and moments, and what is gathered while a
layer runs. What moves between devices is told, and not counted in the time: it overlaps with arithmetic where links
are fast enough, and which links there are nobody told.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedConfig

from longmem.config import LongMemConfig, MemTRMConfig, side_layout
from longmem.errors import ConfigError
from longmem.memory.index import SCORES_AT_ONCE
from longmem.training.hardware import GIB, HARDWARE, Hardware
from longmem.training.sizes import Sizes

if TYPE_CHECKING:
    from longmem.training.recipe import Recipe

MIB = 1 << 20
RESERVE = 1 * GIB
"""The CUDA context, kernels' workspaces and what the allocator cannot use."""
ADAM_BYTES = 8
"""Two float32 moments per trained parameter."""
KEY_BYTES = 4
"""Chunk keys are kept in float32."""
REDUCED_BYTES = 4
"""FSDP2 adds gradients up in float32."""
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""bitsandbytes' 4 bits, doubly quantised: half a byte a weight, a byte for 64 of them, a float32 for 256 of those."""


@dataclass(frozen=True)
class Work:
    """What is done with a model.

    Attributes:
        rows: texts read side by side on a device.
        segment: T, tokens of a segment.
        tokens: of the whole run, over all devices.
        trained_bytes: of a trained weight and of its gradient (float32 master weights: 4).
        frozen_bytes: of a frozen weight.
        compute_bytes: of an activation (bf16: 2).
        bank_bytes: of a remembered number.
        memory: tokens a row remembers when full; 0 trains without memory.
        banks: how many banks of that size a device holds; None is one for every row.
        gradient_checkpointing: keep only the trained layers' inputs for backward.
        segments: consecutive segments of every row in one forward pass.
        quantised: how bitsandbytes keeps the frozen backbone's matrices.
        divided: FSDP2 divides weights, gradients and moments among the devices.
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
    segments: int = 1
    quantised: Literal["8bit", "4bit"] | None = None
    divided: bool = False

    @property
    def positions(self) -> int:
        """Tokens of a forward pass on a device."""
        return self.rows * self.segments * self.segment


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
        traffic: bytes that a device receives from the others for a forward and backward pass under FSDP2.
    """

    parameters: int
    trained: int
    bytes: dict[str, int]
    flops: dict[str, float]
    reads: float
    work: Work
    hardware: Hardware
    traffic: float = 0.0

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
        told = [
            f"parameters: {self.parameters:,} in the backbone, {self.trained:,} trained",
            f"memory per device: {_size(self.total_bytes)} of {_size(machine.memory)}, {verdict} ({memory})",
            f"work per token: {sum(self.flops.values()) / 1e9:.2f} GFLOP ({work}); retrieval moves {_size(self.reads)}",
            f"time on {machine.name}: {_hours(self.hours)} for {self.work.tokens:,} tokens, {speed}",
        ]
        if self.traffic:
            told.append(f"between devices: each receives {_size(self.traffic)} a pass, which the time leaves out")
        return told


def estimate(what: Recipe | tuple[PreTrainedConfig, Work], hardware: Hardware | str) -> Estimate:
    """Memory and hours of a recipe, or of a config and the work to be done with it.

    Args:
        what: a recipe; or a config (``LongMemConfig``: adaptation; ``MemTRMConfig``: the backbone trained with its
            memory; a backbone's: pre-training) and a ``Work``.
        hardware: a machine, or the name of one in ``HARDWARE``.

    Raises:
        ConfigError: unknown hardware, a recipe without a budget in steps or tokens, or a MemTRM divided by FSDP2.
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
    assert config.backbone_config is not None
    sources = side_layout(config.backbone_config.get_text_config(), config.stride).sources
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
    world = hardware.devices if work.divided else 1
    rest, largest = sizes.parameters - sum(sizes.layers), max(sizes.layers)
    frozen = _frozen_bytes(sizes, work)
    parts = {
        "backbone": _part(frozen, world),
        "dequantised": sizes.largest * work.compute_bytes if work.quantised == "4bit" else 0,
        **_trained_bytes(trained, work, world),
        # the root holds embeddings and head; one layer runs while the next one arrives
        "gathered": (rest + 2 * largest) * work.frozen_bytes
        + _gathered_layer(max(sizes.layers[source] for source in sources), work)
        if world > 1
        else 0,
        "residual states": (len(sources) + 2) * work.positions * sizes.width * work.compute_bytes,
        "activations": _activations(sizes, len(sources), work),
        "logits": _logits(sizes, work),
        "mask": _mask(sizes, work),
        "bank": bank_bytes(sizes, config.chunk_size, work),
        "search scratch": SCORES_AT_ONCE["gpu"] * 4 if memory else 0,
        "reserve": RESERVE,
    }
    # frozen layers arrive for forward alone: no gradient passes them
    moved = frozen + trained * (2 * work.compute_bytes + REDUCED_BYTES)
    reads, traffic = _reads(sizes, config, work), moved * (world - 1) / world
    return Estimate(sizes.parameters, trained, parts, flops, reads, work, hardware, traffic)


def pretraining(sizes: Sizes, work: Work, hardware: Hardware) -> Estimate:
    """All of a backbone from scratch."""
    local = 4 * work.segment * sizes.heads * sizes.head_dim
    again = 4 if work.gradient_checkpointing else 3
    layers = len(sizes.layers)
    flops = {
        "layers": float(again) * (2 * sum(sizes.active) + layers * local),
        "head": 3.0 * 2 * sizes.head,
    }
    world = hardware.devices if work.divided else 1
    rest = sizes.parameters - sum(sizes.layers)
    # embeddings and head are computed with as they are, in their own dtype
    root = rest * (work.trained_bytes + REDUCED_BYTES)
    parts = {
        **_trained_bytes(sizes.parameters, work, world),
        "gathered": root + _gathered_layer(max(sizes.layers), work) if world > 1 else 0,
        "activations": _activations(sizes, layers, work),
        "logits": _logits(sizes, work),
        "mask": _mask(sizes, work),
        "reserve": RESERVE,
    }
    moved = sum(sizes.layers) * (2 * work.compute_bytes + REDUCED_BYTES) + rest * (work.trained_bytes + REDUCED_BYTES)
    traffic = moved * (world - 1) / world
    return Estimate(sizes.parameters, sizes.parameters, parts, flops, 0.0, work, hardware, traffic)


def coupled(sizes: Sizes, config: MemTRMConfig, work: Work, hardware: Hardware) -> Estimate:
    """All of a backbone, while one of its layers reads memory; that layer is never recomputed, nor is its search.

    Raises:
        ConfigError: it is to be divided among devices, which training refuses too.
    """
    if work.divided:
        raise ConfigError(
            "a MemTRM trains the layers that write its memory, which FSDP2 cannot divide; set optim.parallel = 'ddp'"
        )
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
        **_trained_bytes(sizes.parameters + sizes.heads, work, 1),
        "bank": bank_bytes(sizes, config.chunk_size, work),
        "search scratch": SCORES_AT_ONCE["gpu"] * 4 if memory else 0,
    }
    reads = _reads(sizes, config, replace(work, gradient_checkpointing=False))
    return Estimate(sizes.parameters, sizes.parameters + sizes.heads, parts, flops, reads, work, hardware)


def bank_bytes(sizes: Sizes, chunk_size: int, work: Work) -> int:
    """Keys, values and chunk keys of the banks of one device."""
    if not work.memory:
        return 0
    numbers = sizes.heads_kv * sizes.head_dim
    held = work.memory
    one = held * numbers * 2 * work.bank_bytes + held // chunk_size * numbers * KEY_BYTES
    return one * (work.rows if work.banks is None else work.banks)


def _frozen_bytes(sizes: Sizes, work: Work) -> int:
    """Of the whole backbone; quantisation leaves embeddings, norms, biases and the head as they are."""
    if work.quantised is None:
        return sizes.parameters * work.frozen_bytes
    small = sizes.matrices * NF4_BYTES if work.quantised == "4bit" else sizes.matrices + 4 * sizes.outputs
    return round(small) + (sizes.parameters - sizes.matrices) * work.frozen_bytes


def _trained_bytes(trained: int, work: Work, world: int) -> dict[str, int]:
    # autocast keeps a cast copy; divided weights are cast where they are gathered, and let go
    copies = work.compute_bytes if work.compute_bytes < work.trained_bytes and world == 1 else 0
    return {
        "trained weights": _part(trained * (work.trained_bytes + copies), world),
        "gradients": _part(trained * work.trained_bytes, world),
        "optimiser": _part(trained * ADAM_BYTES, world),
    }


def _gathered_layer(parameters: int, work: Work) -> int:
    """A trained layer that runs and the next one, and the gradient of one as computed and as it is added up."""
    return parameters * (2 * work.compute_bytes + work.compute_bytes + REDUCED_BYTES)


def _part(count: int, world: int) -> int:
    return -(-count // world)


def _activations(sizes: Sizes, layers: int, work: Work) -> int:
    """What backward needs of the trained layers, with an attention kernel that keeps no scores.

    Per token and layer: the layer's input and the norm's output, queries, keys, values, the attention's output; the
    feed-forward's input projection before and after its activation, and its gate where it has one.
    """
    attention = sizes.head_dim * (2 * sizes.heads + 2 * sizes.heads_kv)
    one = 2 * sizes.width + attention + sizes.inner * (3 if sizes.gated else 2)
    kept = layers * sizes.width + one if work.gradient_checkpointing else layers * one
    return work.positions * kept * work.compute_bytes


def _logits(sizes: Sizes, work: Work) -> int:
    """Logits as computed, in float32 for the loss, and their gradient in both."""
    return work.positions * sizes.vocab * 2 * (work.compute_bytes + 4)


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
    step = optim.rows * optim.segments * optim.accumulate * recipe.data.window * hardware.devices
    tokens = optim.tokens if optim.tokens is not None else optim.steps and optim.steps * step
    if tokens is None:
        raise ConfigError("optim.tokens and optim.steps are both missing; an estimate needs one of them")
    work: dict[str, Any] = {
        "rows": optim.rows,
        "segment": recipe.data.window,
        "tokens": tokens,
        "compute_bytes": 2 if half else 4,
        "gradient_checkpointing": optim.gradient_checkpointing,
        "segments": optim.segments,
        "divided": optim.parallel == "fsdp" and hardware.devices > 1,
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
        quantised=recipe.backbone.quantised,
    )


def _pretrained_config(recipe: Recipe) -> PreTrainedConfig:
    from transformers import AutoConfig

    from longmem.training.backbone_shape import backbone_shape

    if recipe.model.init is not None:
        config: PreTrainedConfig = AutoConfig.from_pretrained(recipe.model.init)
        return config
    return backbone_shape(recipe)


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


def _size(count: float) -> str:
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / 1024:.1f} KiB"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 100 else f"{hours:,.0f} hours ({hours / 24:,.0f} days)"
