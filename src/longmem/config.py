"""``LongMemConfig``, and those of the baselines: everything about a model except its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from longmem.errors import ConfigError

Init = Literal["copy", "zero"]
FinalState = Literal["pre_norm", "normed"]
Fusion = Literal["gate", "softmax"]


class LongMemConfig(PreTrainedConfig):
    """Architecture of a SideNet over a named, frozen backbone.

    Args:
        backbone_config: config (or its dict) of the backbone.
        backbone_name_or_path: where ``from_pretrained`` finds the backbone; None if it must be handed over.
        backbone_revision: hub revision of the backbone.
        backbone_fingerprint: hash of the backbone's config and weights, see ``Backbone.fingerprint``.
        memory_layer: 0-based backbone layer whose keys and values are remembered; None takes the paper's
            three quarters of the depth (section 3: layer 18 of 24, counted from one).
        stride: SideNet layer i is copied from backbone layer ``stride*i + 1`` (paper: 2).
        chunk_size: S, tokens per chunk (paper: 4).
        num_retrieved: K, tokens each query and head retrieves; a multiple of ``chunk_size`` (paper: 64).
        memory_size: M, tokens a bank row holds by default (paper: 65,536).
        init: ``copy`` (paper) or ``zero``: copied layers whose two output projections start at zero, so that
            the model starts exactly at its backbone's perplexity.
        final_state: which state ends the last cross-network residual. ``pre_norm``: the last layer's output, as the
            paper writes it; ``normed``: after the final norm, as the released code computes it.
        fusion: ``gate`` (paper): one share per head; ``softmax``: one softmax over local and memory scores with a
            bias per head, so that each token chooses its own share.
        side_activation: activation of the SideNet's FFN where it differs from the backbone's (released code: ``gelu``).
        side_norm_eps: epsilon of the SideNet's norms where it differs (released code: 1e-5).

    Raises:
        ConfigError: lists every setting that breaks a rule.
    """

    model_type = "longmem"

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        backbone_name_or_path: str | None = None,
        backbone_revision: str | None = None,
        backbone_fingerprint: str | None = None,
        memory_layer: int | None = None,
        stride: int = 2,
        chunk_size: int = 4,
        num_retrieved: int = 64,
        memory_size: int = 65536,
        init: Init = "copy",
        final_state: FinalState = "pre_norm",
        fusion: Fusion = "gate",
        side_activation: str | None = None,
        side_norm_eps: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone_config = _as_config(backbone_config)
        self.backbone_name_or_path = backbone_name_or_path
        self.backbone_revision = backbone_revision
        self.backbone_fingerprint = backbone_fingerprint
        self.memory_layer = memory_layer
        self.stride = stride
        self.chunk_size = chunk_size
        self.num_retrieved = num_retrieved
        self.memory_size = memory_size
        self.init = init
        self.final_state = final_state
        self.fusion = fusion
        self.side_activation = side_activation
        self.side_norm_eps = side_norm_eps
        problems = self.problems()
        if problems:
            raise ConfigError(problems)
        super().__init__(**kwargs)

    @property
    def num_chunks(self) -> int:
        """R = K / S, chunks each query and head retrieves."""
        return self.num_retrieved // self.chunk_size

    def problems(self) -> list[str]:
        """Every broken rule, one line each."""
        found = _size_problems(self, ("stride", *_SIZES))
        for name, allowed in (("init", ("copy", "zero")), ("final_state", ("pre_norm", "normed")), _FUSIONS):
            if getattr(self, name) not in allowed:
                found.append(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(allowed)}")
        return found

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The cache view: the backbone's config with the SideNet's layers behind its own.

        ``generate()`` sizes its cache from this, so one cache object serves backbone and SideNet.
        """
        from longmem.modeling.families import cache_view

        if self.backbone_config is None:
            return self
        return cache_view(self.backbone_config, self.stride)


class AugmentedConfig(PreTrainedConfig):
    """Settings of a causal language model one of whose own layers reads memory: no SideNet.

    Args:
        backbone_config: config (or its dict) of the backbone.
        backbone_name_or_path: where the backbone was loaded from.
        backbone_revision: hub revision of the backbone.
        backbone_fingerprint: hash of the weights that run, see ``Backbone.fingerprint``; memory is tied to them.
        memory_layer: 0-based layer whose keys and values are remembered, and which reads them; None takes the layer
            that a LongMem would remember.
        chunk_size: S, tokens per chunk; 1 retrieves single tokens, as the Memorizing Transformer does.
        num_retrieved: K, tokens each query and head retrieves; a multiple of ``chunk_size``.
        memory_size: M, tokens a bank row holds by default.
        fusion: ``gate``: one share per head; ``softmax``: one softmax over local and memory scores.
        gate: share of its output that a head takes from memory, for all heads or one for each; trained where the
            model is, then this is where it starts. With ``fusion="softmax"`` its logit is added to the memory scores,
            so 0.5 lets memory and context compete as they are.

    Raises:
        ConfigError: lists every setting that breaks a rule.
    """

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        backbone_name_or_path: str | None = None,
        backbone_revision: str | None = None,
        backbone_fingerprint: str | None = None,
        memory_layer: int | None = None,
        chunk_size: int = 4,
        num_retrieved: int = 64,
        memory_size: int = 65536,
        fusion: Fusion = "gate",
        gate: float | Sequence[float] = 0.5,
        **kwargs: Any,
    ) -> None:
        self.backbone_config = _as_config(backbone_config)
        self.backbone_name_or_path = backbone_name_or_path
        self.backbone_revision = backbone_revision
        self.backbone_fingerprint = backbone_fingerprint
        self.memory_layer = memory_layer
        self.chunk_size = chunk_size
        self.num_retrieved = num_retrieved
        self.memory_size = memory_size
        self.fusion = fusion
        self.gate: float | list[float] = float(gate) if isinstance(gate, int | float) else [float(g) for g in gate]
        problems = self.problems()
        if problems:
            raise ConfigError(problems)
        super().__init__(**kwargs)

    @property
    def num_chunks(self) -> int:
        """R = K / S, chunks each query and head retrieves."""
        return self.num_retrieved // self.chunk_size

    @property
    def gates(self) -> list[float]:
        """The shares given, one or one for each head."""
        return [self.gate] if isinstance(self.gate, float) else self.gate

    def problems(self) -> list[str]:
        """Every broken rule, one line each."""
        found = _size_problems(self, _SIZES)
        name, allowed = _FUSIONS
        if self.fusion not in allowed:
            found.append(f"{name} ({self.fusion!r}) must be one of {', '.join(allowed)}")
        heads = None if self.backbone_config is None else self.backbone_config.get_text_config().num_attention_heads
        if len(self.gates) not in (1, heads or len(self.gates)):
            found.append(f"gate ({len(self.gates)} shares) must be one share, or one for each of the {heads} heads")
        return found + [f"gate ({g:g}) must be {rule}" for g in self.gates if (rule := self._wrong_gate(g))]

    def _wrong_gate(self, gate: float) -> str | None:
        return None if 0 <= gate <= 1 else "between 0 (memory unread) and 1 (nothing but memory)"

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The backbone's own: caches are as deep as it is."""
        if self.backbone_config is None:
            return self
        return self.backbone_config.get_text_config(decoder=decoder, encoder=encoder)


class MemTRMConfig(AugmentedConfig):
    """A Memorizing Transformer: the backbone, trained with its memory.

    Args:
        start_name_or_path: the backbone that training started from; ``backbone_name_or_path`` is what became of it.
        start_fingerprint: of that backbone.
        **kwargs: as in ``AugmentedConfig``; ``gate`` must lie strictly between 0 and 1, where it can be trained.
    """

    model_type = "memtrm"

    def __init__(
        self, start_name_or_path: str | None = None, start_fingerprint: str | None = None, **kwargs: Any
    ) -> None:
        self.start_name_or_path = start_name_or_path
        self.start_fingerprint = start_fingerprint
        super().__init__(**kwargs)

    def _wrong_gate(self, gate: float) -> str | None:
        return None if 0 < gate < 1 else "above 0 and below 1, or its logit could not be trained; try 0.5"


class TrainingFreeConfig(AugmentedConfig):
    """The frozen backbone with memory attention at one layer, its gate given and nothing trained."""

    model_type = "training_free"

    def __init__(self, **kwargs: Any) -> None:
        # a config without an ``__init__`` of its own would be given one that knows no settings
        super().__init__(**kwargs)


_SIZES = ("chunk_size", "num_retrieved", "memory_size")
_FUSIONS = ("fusion", ("gate", "softmax"))


def _as_config(backbone_config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig | None:
    if not isinstance(backbone_config, dict):
        return backbone_config
    fields = dict(backbone_config)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _size_problems(config: Any, names: Sequence[str]) -> list[str]:
    """Settings below 1, or else those of tokens that are no whole number of chunks."""
    found = [f"{name} ({getattr(config, name)}) must be at least 1" for name in names if getattr(config, name) < 1]
    if found:
        return found
    for name in ("num_retrieved", "memory_size"):
        value, rest = getattr(config, name), getattr(config, name) % config.chunk_size
        if rest:
            below, above = value - rest, value - rest + config.chunk_size
            tries = f"{below} or {above}" if below else f"{above}"
            found.append(f"{name} ({value}) must be a multiple of chunk_size ({config.chunk_size}); try {tries}")
    return found


class LongMemGenerationConfig(GenerationConfig):
    """transformers' generation settings, and what happens when the local window is full.

    The window is what the model attends to directly. When it is full its oldest tokens move to memory, the rest is
    read again from its beginning, and generation goes on: constant cost and memory, however long the text. A prompt
    longer than the window goes the same way, so generating in two calls equals generating in one. Every field can be
    given to ``generate`` as an argument.

    Args:
        window: most tokens attended to directly; None is the backbone's ``max_position_embeddings``, and no limit
            where it has none.
        window_move: how many of the oldest tokens move when it is full, a multiple of the memory's chunk size; None is
            half the window.
        window_overlap: how many tokens before those that move their keys and values may see. They are read once more
            for this and not written twice. 0: every piece is read alone, as in training.
        session_tokens: most tokens that what has moved may take in memory, oldest out; None is the model's
            ``memory_size``.
        **kwargs: fields of ``GenerationConfig``.
    """

    def __init__(
        self,
        *,
        window: int | None = None,
        window_move: int | None = None,
        window_overlap: int = 0,
        session_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.window = window
        self.window_move = window_move
        self.window_overlap = window_overlap
        self.session_tokens = session_tokens
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def over(cls, config: GenerationConfig | None) -> LongMemGenerationConfig:
        """The settings of a backbone with ours beside them."""
        fields = {} if config is None else config.to_dict()
        return cls(**{name: value for name, value in fields.items() if name != "transformers_version"})
