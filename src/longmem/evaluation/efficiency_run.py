"""What ``efficiency`` times: systems of one model, each reading a text and continuing it, a clock on every token.

All of them go through transformers' ``generate``, as their users do. Full attention is given what serves it best: its
backend's fused kernels (SDPA), a key/value cache made as long as it will be, so that nothing is copied on the way, and
logits of the last position only.

B rows · H heads · T tokens · D head_dim
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from longmem.errors import ConfigError
from longmem.evaluation.efficiency_names import FULL, LONGMEM
from longmem.generation.reading import positions
from longmem.generation.window import WindowPolicy
from longmem.memory.session import SessionMemory
from longmem.modeling.longmem import LongMem


@dataclass(frozen=True)
class RandomShape:
    """A random Llama-like backbone, because how long a step takes does not depend on its weights."""

    hidden: int = 512
    layers: int = 12
    heads: int = 8
    kv_heads: int | None = None
    intermediate: int | None = None
    vocab: int = 8192
    chunk_size: int = 4
    num_retrieved: int = 64
    memory_size: int = 65536

    @classmethod
    def parse(cls, text: str) -> RandomShape:
        """``hidden=512,layers=12``; what is not said keeps its default.

        Raises:
            ConfigError: lists every part that means nothing, or that does not go with the others.
        """
        names, given, problems = [field.name for field in fields(cls)], dict[str, int](), list[str]()
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            if name not in names or not value.strip().isdecimal() or int(value) < 1:
                problems.append(f"--random ({part}) must be NAME=NUMBER with a name of {', '.join(names)}")
            else:
                given[name] = int(value)
        shape = cls(**given)
        if shape.hidden % (2 * shape.heads):  # rotary positions turn pairs
            step = 2 * shape.heads
            problems.append(
                f"--random: hidden ({shape.hidden}) must be a multiple of twice the heads ({shape.heads}); "
                f"try hidden={max(1, round(shape.hidden / step)) * step}"
            )
        if shape.kv_heads is not None and shape.heads % shape.kv_heads:
            problems.append(f"--random: kv_heads ({shape.kv_heads}) must divide the heads ({shape.heads})")
        if problems:
            raise ConfigError(problems)
        return shape


@dataclass(frozen=True)
class Source:
    """Where the model comes from: a checkpoint, or a shape."""

    path: str | None = None
    backbone: str | None = None
    random: RandomShape | None = None
    device: str = "cpu"
    dtype: str = "auto"
    seed: int = 0

    def load(self) -> LongMem:
        """The model, on its device, in eval mode.

        Raises:
            ConfigError: neither or both are named, or what is named has no memory.
        """
        if (self.path is None) == (self.random is None):
            raise ConfigError("name one model: --model FOLDER, or --random SHAPE for a backbone of random weights")
        from longmem.evaluation.loading import checked_device

        checked_device(self.device)
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        model: Any = self._random(self.random, dtype) if self.random is not None else self._loaded(dtype)
        placed: LongMem = model.to(self.device).eval()
        return placed

    def _loaded(self, dtype: torch.dtype | None) -> LongMem:
        from longmem.evaluation.loading import load_comparison

        assert self.path is not None
        main = load_comparison(self.path, backbone=self.backbone, device=self.device, dtype=dtype).comparison.main
        if main is None:
            raise ConfigError(f"{self.path}: no LongMem checkpoint; efficiency compares LongMem with its own backbone")
        return main

    def _random(self, shape: RandomShape, dtype: torch.dtype | None) -> LongMem:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate or 64 * round(shape.hidden * 8 / 3 / 64) or 64,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads or shape.heads,
            max_position_embeddings=1 << 21,
            pad_token_id=0,
            eos_token_id=None,
        )
        backbone: Any = LlamaForCausalLM(config)
        memory = {name: getattr(shape, name) for name in ("chunk_size", "num_retrieved", "memory_size")}
        return LongMem.from_backbone(backbone.to(dtype or torch.float32), **memory)


@dataclass(frozen=True)
class Setting:
    """How the systems run.

    Args:
        window: tokens that LongMem attends to directly.
        move: how many of them go to memory when it is full.
        memory_size: most tokens in memory.
        new_tokens: how many are generated behind the context.
        piece: tokens that full attention reads at once; None is all of them.
    """

    window: int
    move: int
    memory_size: int
    new_tokens: int
    piece: int | None = None

    @classmethod
    def of(
        cls, model: LongMem, window: int, memory_size: int | None, new_tokens: int, piece: int | None = None
    ) -> Setting:
        """With what the model says where nothing is said.

        Raises:
            ConfigError: lists every setting that breaks a rule.
        """
        given = {"window": window, **({} if memory_size is None else {"session_tokens": memory_size})}
        policy = WindowPolicy.of(_Wanted(**given), model, None)
        assert policy is not None
        problems = [
            f"{name} ({value}) must be at least {least}"
            for name, value, least in (("new_tokens", new_tokens, 2), ("piece", piece, 1))
            if value is not None and value < least
        ]
        if problems:
            raise ConfigError(problems)
        return cls(policy.window, policy.move, policy.session_tokens, new_tokens, piece)

    def whole(self, context: int) -> int:
        """The nearest context at which the window is exactly full, so that a move falls into every run alike."""
        if context <= self.window:
            return context
        return self.window + round((context - self.window) / self.move) * self.move


@dataclass(frozen=True)
class _Wanted:
    window: int
    session_tokens: int | None = None


@dataclass(frozen=True)
class Timeline:
    """Seconds until the first new token, and between each and the next; in which of the gaps text moved to memory."""

    first: float
    gaps: tuple[float, ...]
    moved: tuple[bool, ...]

    @property
    def plain(self) -> float:
        """Seconds of a token while nothing moves: the median."""
        still = [gap for gap, moved in zip(self.gaps, self.moved, strict=True) if not moved] or list(self.gaps)
        return float(torch.tensor(still, dtype=torch.float64).median())

    @property
    def moving(self) -> float | None:
        """What a move adds to the token it falls on; None where none fell into the run."""
        found = [gap for gap, moved in zip(self.gaps, self.moved, strict=True) if moved]
        return max(0.0, sum(found) / len(found) - self.plain) if found else None

    def each(self, move: int) -> float:
        """Seconds of a token with its share of the moves, one of which falls on every ``move`` tokens."""
        return self.plain + (self.moving or 0.0) / move


def context_ids(model: LongMem, context: int, seed: int) -> Tensor:
    """(1, context) tokens of a text that means nothing, the same for every system."""
    vocabulary = int(model.backbone.model.config.get_text_config().vocab_size)
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(min(8, vocabulary - 1), vocabulary, (1, context), generator=draw).to(model.device)


def why_not(model: LongMem, system: str, context: int, setting: Setting) -> str | None:
    """Why a system cannot be asked at this length."""
    limit = positions(model)
    if system == FULL and limit is not None and context + setting.new_tokens > limit:
        return f"the backbone's positions end at {limit:,}"
    return None


@torch.no_grad()
def run(model: LongMem, system: str, ids: Tensor, setting: Setting) -> Timeline:
    """Read a context (1, T) and generate behind it, greedily."""
    _wait(model.device)
    began = time.perf_counter()
    longest = ids.shape[1] + setting.new_tokens
    inner, given = model.backbone.model, dict[str, Any]()
    session: SessionMemory | None = None
    if system == LONGMEM:
        given = {"window": setting.window, "window_move": setting.move}
        if longest - 1 > setting.window:
            chunk = model.config.chunk_size
            session = SessionMemory.for_model(model, None, 1, min(setting.memory_size, -(-longest // chunk) * chunk))
            given["memory"] = session
    elif system == FULL:
        given = {"past_key_values": roomy_cache(inner.config, longest)}
        if setting.piece is not None and setting.piece < ids.shape[1]:
            given["prefill_chunk_size"] = setting.piece
    else:
        ids = ids[:, -max(1, setting.window - setting.new_tokens) :]
    clock = _Clock(model.device, session)
    speaker: Any = model if system == LONGMEM else inner
    speaker.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=setting.new_tokens,
        min_new_tokens=setting.new_tokens,
        do_sample=False,
        use_cache=True,
        stopping_criteria=StoppingCriteriaList([clock]),
        **given,
    )
    times, versions = clock.times, clock.versions
    return Timeline(
        first=times[0] - began,
        gaps=tuple(b - a for a, b in pairwise(times)),
        moved=tuple(b != a for a, b in pairwise(versions)),
    )


class _Clock(StoppingCriteria):
    """Asked after every token; stops nothing."""

    def __init__(self, device: torch.device, session: SessionMemory | None) -> None:
        self._device, self._session = device, session
        self.times: list[float] = []
        self.versions: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        _wait(self._device)
        self.times.append(time.perf_counter())
        self.versions.append(0 if self._session is None else self._session.bank.version)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer in a buffer made once: no copy for each new token, and no slots to be masked."""

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room, self._length = room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = [
            states.new_empty(*states.shape[:2], self._room, states.shape[3]) for states in (key_states, value_states)
        ]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, D) behind those that are there; all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._length + key_states.shape[2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length : end] = states
        self._length = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values


def roomy_cache(config: Any, room: int) -> Cache:
    """A cache for ``room`` tokens; layers that attend to a sliding window keep theirs, which does not grow."""
    layers = DynamicCache(config=config).layers
    plain = [type(layer) is DynamicLayer for layer in layers]
    return Cache(layers=[RoomyLayer(room) if alike else layer for alike, layer in zip(plain, layers, strict=True)])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def as_job(source: Source, setting: Setting, system: str, context: int) -> dict[str, Any]:
    """What a child process is to run, as JSON."""
    return {"source": asdict(source), "setting": asdict(setting), "system": system, "context": context}


def from_job(job: dict[str, Any]) -> tuple[Source, Setting, str, int]:
    """The inverse of ``as_job``."""
    source = dict(job["source"])
    shape = source.pop("random")
    return (
        Source(**source, random=None if shape is None else RandomShape(**shape)),
        Setting(**job["setting"]),
        str(job["system"]),
        int(job["context"]),
    )


def weights_bytes(model: LongMem, systems: Sequence[str] = (LONGMEM,)) -> int:
    """Of all parameters; of the backbone's where LongMem is not among the systems."""
    parts = model.parameters() if LONGMEM in systems else model.backbone.model.parameters()
    return sum(parameter.nbytes for parameter in parts)
