"""``LongMemConfig``, and those of the baselines: everything about a model except its weights."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import field
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from longmem.errors import ConfigError, not_a_multiple

Init = Literal["copy", "zero", "delta"]
Trained = Literal["all", "attention"]
FinalState = Literal["pre_norm", "normed"]
Fusion = Literal["gate", "softmax", "token"]


class MemoryConfig(PreTrainedConfig):
    """What every model that reads memory is told; see ``LongMemConfig`` and ``AugmentedConfig``.

    Args:
        backbone_config: config (or its dict) of the backbone.
        backbone_name_or_path: where ``from_pretrained`` finds the backbone; None if it must be handed over.
        backbone_revision: hub revision of the backbone.
        backbone_kwargs: what else ``AutoModelForCausalLM.from_pretrained`` needs to find it (``subfolder``,
            ``gguf_file``, ``variant``, ...).
        backbone_fingerprint: hash of the backbone's architecture and weights, see ``modeling.weights``.
        backbone_sketch: a few values of every weight, by which the same weights in another precision are known.
        memory_layers: 0-based backbone layers whose keys and values are remembered, ascending; one number will do.
            None takes the paper's three quarters of the depth (section 3: layer 18 of 24, counted from one).
        chunk_size: S, tokens per chunk (paper: 4); 1 retrieves single tokens, as the Memorizing Transformer does.
        num_retrieved: K, tokens each query and head retrieves; a multiple of ``chunk_size`` (paper: 64).
        memory_size: M, tokens a bank row holds by default (paper: 65,536).
        fusion: ``gate`` (paper): one share per head; ``softmax``: one softmax over local and memory scores with a
            bias per head, so that each token chooses its own share; ``token``: a trained choice of every token, see
            ``TokenGate`` (not for ``MemTRM``).
        recency: what a chunk's attention scores lose to a newer one that matches as well, see ``recency_bonus``: of two
            facts that say otherwise, the newer one is read. 0 (paper): age does not count.
        memory_temperature: the attention scores of retrieved tokens are divided by it among themselves; the share that
            memory gets stays. Below 1 the best matches get more, as a memory much larger than those trained with needs
            it. 1 (paper): scores as they are.

    Raises:
        ConfigError: lists every setting that breaks a rule.
    """

    token_gates: ClassVar[bool] = False
    """Whether the model has the gates that fusion "token" needs."""

    backbone_config: PreTrainedConfig | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    backbone_kwargs: dict[str, Any] = field(default_factory=dict)
    backbone_fingerprint: str | None = None
    backbone_sketch: str | None = None
    memory_layers: tuple[int, ...] | None = None
    chunk_size: int = 4
    num_retrieved: int = 64
    memory_size: int = 65536
    fusion: Fusion = "gate"
    recency: float = 0.0
    memory_temperature: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        given: Any = self.backbone_config
        if isinstance(given, dict):
            fields = dict(given)
            self.backbone_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self.backbone_kwargs = dict(self.backbone_kwargs or {})
        one = kwargs.pop("memory_layer", None)  # what checkpoints and recipes of one layer say
        layers: Any = one if self.memory_layers is None else self.memory_layers
        self.memory_layers = None if layers is None else tuple(layers) if isinstance(layers, Iterable) else (layers,)
        if problems := self.problems():
            raise ConfigError(problems)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        # other tools ask a model's config for its vocabulary, its window, ...: those are the backbone's
        if name in _PASSED_ON and (backbone := self.__dict__.get("backbone_config")) is not None:
            return getattr(backbone.get_text_config(), name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def num_chunks(self) -> int:
        """R = K / S, chunks each query and head retrieves."""
        return self.num_retrieved // self.chunk_size

    @property
    def memory_layer(self) -> int | None:
        """The first remembered layer; in the paper there is one."""
        return None if self.memory_layers is None else self.memory_layers[0]

    def problems(self) -> list[str]:
        """Every broken rule, one line each."""
        names = ("chunk_size", "num_retrieved", "memory_size")
        found = [problem for name in names for problem in _no_count(name, getattr(self, name))]
        for name in names[1:] if not found else ():
            found += not_a_multiple(name, getattr(self, name), "chunk_size", self.chunk_size)
        found += _choices(self, fusion=Fusion)
        if not 0 <= _number(self.recency) < math.inf:
            found.append(f"recency ({self.recency!r}) must be a number from 0 on; 0 reads old and new alike")
        if not 0 < _number(temperature := self.memory_temperature) < math.inf:
            found.append(f"memory_temperature ({temperature!r}) must be a number above 0; 1 changes nothing")
        if self.fusion == "token" and not self.token_gates:
            found.append(f'fusion ("token") is not for {type(self).__name__}; use "gate" or "softmax"')
        layers = self.memory_layers
        numbers = all(isinstance(layer, Integral) for layer in layers or ())
        if layers is not None and not (layers and numbers and list(layers) == sorted(set(layers))):
            found.append(f"memory_layers ({list(layers)}) must be different layers, counted from 0, in ascending order")
        return found

    @classmethod
    def settings_among(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Take this config's settings out of ``given``; what is left is for transformers.

        Raises:
            ConfigError: a name that is left is nearly that of a setting.
        """
        fields = set(cls().to_dict()) - set(PreTrainedConfig().to_dict())
        known = {name for name in fields if not name.startswith(("backbone_", "start_"))} | {"memory_layer"}
        own = {name: given.pop(name) for name in known & given.keys()}
        meant = {name: nearest(name, known) for name in sorted(given)}
        if any(meant.values()):
            raise ConfigError([f"{name} is no setting of {cls.__name__}{like}" for name, like in meant.items() if like])
        return own

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The backbone's own: caches are as deep as it is."""
        if self.backbone_config is None:
            return self
        return self.backbone_config.get_text_config(decoder=decoder, encoder=encoder)


class LongMemConfig(MemoryConfig):
    """Architecture of a SideNet over a named, frozen backbone.

    Args:
        stride: SideNet layer i is copied from backbone layer ``stride*i + 1`` (paper: 2); see ``side_layout``.
        init: ``copy`` (paper); ``zero``: copied layers whose two output projections start at zero; ``delta``: layers
            are copied from the first memory layer up, and each adds its difference from its source, so what it
            reads goes on through the layers above as in the backbone. The last two start at the backbone's perplexity;
            ``delta`` at stride 1 is a ``TrainingFree`` that can be trained.
        trained: ``all``, or ``attention``: the feed-forward of a copied layer is the backbone's own, which is neither
            trained nor saved.
        final_state: which state ends the last cross-network residual. ``pre_norm``: the last layer's output, as the
            paper writes it; ``normed``: after the final norm, as the released code computes it.
        side_activation: activation of the SideNet's FFN where it differs from the backbone's (released code: ``gelu``).
        side_norm_eps: epsilon of the SideNet's norms where it differs (released code: 1e-5).
        **kwargs: as in ``MemoryConfig``.
    """

    model_type = "longmem"
    token_gates = True

    stride: int = 2
    init: Init = "copy"
    trained: Trained = "all"
    final_state: FinalState = "pre_norm"
    side_activation: str | None = None
    side_norm_eps: float | None = None

    def problems(self) -> list[str]:
        found = _no_count("stride", self.stride) + super().problems()
        if self.init == "zero" and self.trained == "attention":
            found.append('init ("zero") needs a feed-forward of its own; use trained "all", or init "delta"')
        if (eps := self.side_norm_eps) is not None and not 0 < _number(eps) < math.inf:
            found.append(f"side_norm_eps ({eps!r}) must be a number above 0, or null")
        return found + _choices(self, init=Init, trained=Trained, final_state=FinalState)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The cache view: the backbone's config with the SideNet's layers behind its own.

        ``generate()`` sizes its cache from this, so one cache object serves backbone and SideNet.
        """
        if self.backbone_config is None:
            return self
        config = self.backbone_config.get_text_config(decoder=True)
        sources = side_layout(config, self.stride, self.memory_layers or () if self.init == "delta" else ()).sources
        view = copy.deepcopy(config)
        if getattr(config, "num_kv_shared_layers", 0):
            view.num_kv_shared_layers = 0  # counted from the end, where the SideNet's layers now are
        view.num_hidden_layers = config.num_hidden_layers + len(sources)
        if (types := getattr(config, "layer_types", None)) is not None:
            view.layer_types = [*types, *(types[source] for source in sources)]
        return view


class AugmentedConfig(MemoryConfig):
    """Settings of a causal language model some of whose own layers read memory: no SideNet.

    Args:
        gate: share of its output that a head takes from memory, for all heads or one for each (layer by layer);
            trained where the model is, then this is where it starts. With ``fusion="softmax"`` its logit is added to
            the memory scores, so 0.5 lets memory and context compete as they are.
        **kwargs: as in ``MemoryConfig``; each remembered layer is the one that reads its keys.
    """

    gate_ends: ClassVar[bool] = True
    """Whether a gate may be 0 or 1, where its logit cannot be trained."""

    gate: float | list[float] = 0.5

    def __post_init__(self, **kwargs: Any) -> None:
        self.gate = float(self.gate) if isinstance(self.gate, int | float) else [float(gate) for gate in self.gate]
        super().__post_init__(**kwargs)

    @property
    def gates(self) -> list[float]:
        """The shares given, one or one for each head."""
        return [self.gate] if isinstance(self.gate, float) else self.gate

    def problems(self) -> list[str]:
        found = super().problems()
        if self.backbone_config is not None:
            heads = self.backbone_config.get_text_config().num_attention_heads * len(self.memory_layers or (0,))
            if len(self.gates) not in (1, heads):
                found.append(f"gate ({len(self.gates)} shares) must be one share, or one for each of the {heads} heads")
        rule = "between 0 (memory unread) and 1 (nothing but memory)"
        if not self.gate_ends:
            rule = "above 0 and below 1, or its logit could not be trained; try 0.5"
        wrong = [gate for gate in self.gates if not 0 <= gate <= 1 or (gate in (0, 1) and not self.gate_ends)]
        return found + [f"gate ({gate:g}) must be {rule}" for gate in wrong]


class MemTRMConfig(AugmentedConfig):
    """A Memorizing Transformer: the backbone, trained with its memory.

    Args:
        start_name_or_path: the backbone that training started from; ``backbone_name_or_path`` is what became of it.
        start_fingerprint: of that backbone.
        **kwargs: as in ``AugmentedConfig``; ``gate`` must lie strictly between 0 and 1, where it can be trained.
    """

    model_type = "memtrm"
    gate_ends = False

    start_name_or_path: str | None = None
    start_fingerprint: str | None = None


class TrainingFreeConfig(AugmentedConfig):
    """The frozen backbone with memory attention at some of its layers; its gate is given, or calibrated.

    With ``fusion="token"`` the logit of ``gate`` is where the biases of the ``TokenGate`` of every layer start.
    """

    model_type = "training_free"
    token_gates = True

    @property
    def closed(self) -> bool:
        """Whether no head ever takes anything from memory: the model is its backbone."""
        return self.fusion != "token" and not any(self.gates)


_PASSED_ON = (
    "vocab_size", "hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


class SideLayout(NamedTuple):
    """Which backbone layers a SideNet copies, and where their shares of the backbone's residuals begin and end.

    Attributes:
        sources: the backbone layer that SideNet layer i is copied from.
        bounds: SideNet layer i adds H[bounds[i+1]] - H[bounds[i]], so the residuals telescope from the embeddings (0)
            to the last layer's output (L). With ``delta`` they begin at the first memory layer.
    """

    sources: list[int]
    bounds: list[int]


def side_layout(config: PreTrainedConfig, stride: int, delta: Sequence[int] = ()) -> SideLayout:
    """The paper's layout (section 3.2): layer i from ``stride*i + 1``, with the residual over ``stride`` layers.

    With ``delta``, the memory layers, it is these and every ``stride``-th layer from the first of them. In a hybrid
    some layers have no attention, so they could not be asked what they remember: there it is made of the layers
    with full attention, at most one for every ``stride`` layers.
    """
    types = layer_types(config)
    hybrid = not set(types) <= {*_ATTENTION, "reuse"}
    if delta:
        copied = {layer for layer in range(delta[0], len(types), stride) if not hybrid or types[layer] in _ATTENTION}
        sources = sorted({*delta, *copied})
        return SideLayout(sources, [*sources, len(types)])
    count, most = len(types), len(types) // stride
    if not hybrid:
        return SideLayout(
            [stride * i + min(1, stride - 1) for i in range(most)], [*(stride * i for i in range(most)), count]
        )
    full = [layer for layer, kind in enumerate(types) if kind == "full_attention"]
    sources = full[:: max(1, -(-len(full) // max(1, most)))]
    return SideLayout(sources, [0, *(source + 1 for source in sources[:-1]), count])


def layer_types(config: PreTrainedConfig) -> list[str]:
    """The kind of every layer of a text config: ``full_attention``, ``sliding_attention``, ``conv``, ...

    ``reuse``: attention over the keys of an earlier layer (Gemma 4).
    """
    types = list(get_layer_types_and_kwargs(config)[0])
    sharing = getattr(config, "kv_sharing_modes", None) or [None] * len(types)
    return ["reuse" if mode == "reuse" else kind for kind, mode in zip(types, sharing, strict=True)]


LONGEST_WINDOW = 1024
"""The paper's; long-context backbones would otherwise get all they can take."""


def positions(config: PreTrainedConfig) -> int | None:
    """The longest text that a backbone was made for; None where its architecture knows no limit."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def usual_window(config: PreTrainedConfig) -> int:
    """Tokens that a backbone sees together unless another number is given."""
    return min(positions(config) or LONGEST_WINDOW, LONGEST_WINDOW)


def _no_count(name: str, value: Any) -> list[str]:
    """The broken rule, if the value is no whole number from 1 on; a file may hold anything."""
    right = isinstance(value, Integral) and int(value) >= 1
    return [] if right else [f"{name} ({value!r}) must be a whole number, at least 1"]


def _number(value: Any) -> float:
    """NaN, which is within no bounds, of what is no number."""
    return float(value) if isinstance(value, Real) else math.nan


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean X?``, or nothing."""
    like = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {like[0]}?" if like else ""


def _choices(config: Any, **allowed: Any) -> list[str]:
    """Settings that are none of those that their types allow."""
    names = {name: get_args(choices) for name, choices in allowed.items()}
    return [
        f"{name} ({getattr(config, name)!r}) must be one of {', '.join(choices)}"
        for name, choices in names.items()
        if getattr(config, name) not in choices
    ]


CONFIGS: dict[str, type[MemoryConfig]] = {
    each.model_type: each for each in (LongMemConfig, MemTRMConfig, TrainingFreeConfig)
}
"""By ``model_type`` of a config file; any other is of a causal language model by itself."""


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
        session_tokens: most tokens that what has moved may take in memory, oldest out; None is the model's
            ``memory_size``.
        **kwargs: fields of ``GenerationConfig``.
    """

    def __init__(
        self,
        *,
        window: int | None = None,
        window_move: int | None = None,
        session_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.window = window
        self.window_move = window_move
        self.session_tokens = session_tokens
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def over(cls, config: GenerationConfig | None) -> LongMemGenerationConfig:
        """The settings of a backbone with ours beside them."""
        fields = {} if config is None else config.to_dict()
        return cls(**{name: value for name, value in fields.items() if name != "transformers_version"})
