"""``LongMemConfig``: everything about a LongMem model except its weights."""

from __future__ import annotations

from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

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
        if isinstance(backbone_config, dict):
            fields = dict(backbone_config)
            backbone_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self.backbone_config = backbone_config
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
        found = []
        for name in ("stride", "chunk_size", "num_retrieved", "memory_size"):
            if getattr(self, name) < 1:
                found.append(f"{name} ({getattr(self, name)}) must be at least 1")
        if not found:
            for name in ("num_retrieved", "memory_size"):
                value, rest = getattr(self, name), getattr(self, name) % self.chunk_size
                if rest:
                    below, above = value - rest, value - rest + self.chunk_size
                    tries = f"{below} or {above}" if below else f"{above}"
                    found.append(f"{name} ({value}) must be a multiple of chunk_size ({self.chunk_size}); try {tries}")
        for name, allowed in (
            ("init", ("copy", "zero")),
            ("final_state", ("pre_norm", "normed")),
            ("fusion", ("gate", "softmax")),
        ):
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
