"""A causal language model one of whose own layers reads memory: what the two baselines without a SideNet share.

The paper's LongMem keeps the model that writes memory apart from the one that reads it. Here they are one and the same:
layer m of the backbone attends to its segment and to what its position-free queries find, and the layers above go on
from there. Layers up to m never see memory, so what a segment leaves in memory depends on that segment alone.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longmem.config import AugmentedConfig, LongMemConfig, LongMemGenerationConfig
from longmem.errors import BackboneError, ConfigError
from longmem.modeling.backbone import Backbone
from longmem.modeling.explain import Explanation
from longmem.modeling.generating import MemoryGenerationMixin
from longmem.modeling.loading import default_memory_layer, load_backbone
from longmem.modeling.output import LongMemOutput, padding_of
from longmem.modeling.placement import place_of
from longmem.modeling.retrieving import retriever
from longmem.modeling.sidenet import MemoryReader, SideRun
from longmem.types import AttentionKV, Memory


class AugmentedLM(PreTrainedModel, MemoryGenerationMixin):
    """The backbone with memory attention at its memory layer; see ``MemTRM`` and ``TrainingFree``.

    Args:
        config: its ``memory_layer`` may be None (the layer that a LongMem over this backbone would remember).
        backbone: the model that runs.

    Raises:
        BackboneError: if the backbone or the memory layer cannot be used.
    """

    config_class: type[AugmentedConfig] = AugmentedConfig
    base_model_prefix = "backbone"
    frozen: ClassVar[bool]
    memory_gate: Tensor
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: AugmentedConfig, backbone: PreTrainedModel | None = None) -> None:
        name = type(self).__name__
        if backbone is None:
            raise BackboneError(
                f"{name} needs the backbone itself, not only its config; "
                f"use {name}.from_backbone(...) or {name}.from_pretrained(...)"
            )
        config = copy.deepcopy(config)
        config.backbone_config = backbone.config
        problems = config.problems()
        if problems:
            raise ConfigError(problems)
        if config.memory_layer is None:
            config.memory_layer = default_memory_layer(backbone, LongMemConfig().stride)
        super().__init__(config)
        self.backbone = Backbone(backbone, config.memory_layer, frozen=self.frozen)
        family = self.backbone.family
        attention = family.attention(family.layers[config.memory_layer])
        # registered behind the backbone's own hook, which has found the projections by then
        self.reader = MemoryReader(attention, family, config.fusion, self.backbone.probed)
        config.backbone_fingerprint = self.backbone.fingerprint()
        self.config = config
        self.generation_config = LongMemGenerationConfig.over(backbone.generation_config)

    def gate_logits(self) -> Tensor:
        """(H,) logits of the shares in the config, infinite at 0 and 1."""
        shares = torch.tensor(self.config.gates, dtype=torch.float64).expand(self.num_heads)
        return torch.logit(shares).float().to(place_of(self.backbone.family.layers[self.memory_layer]))

    # -- what it is made of ------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Of the weights that run; a bank written by others is refused."""
        return cast(str, self.config.backbone_fingerprint)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.backbone.device

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """Where accelerate put the backbone's parts; there is none where it did not."""
        return cast("dict[str, Any]", self.backbone.model.hf_device_map)

    @property
    def memory_device(self) -> torch.device:
        """Where memory is searched: the device of the memory layer."""
        return self.memory_gate.device

    @property
    def memory_layer(self) -> int:
        """m: the 0-based layer whose keys and values are remembered, and which reads them."""
        return self.backbone.memory_layer

    @property
    def num_heads(self) -> int:
        """H."""
        return self.reader.num_heads

    @property
    def memory_heads(self) -> int:
        """Hkv, key/value heads of the memory layer."""
        return self.backbone.kv_heads

    @property
    def memory_head_dim(self) -> int:
        """D of the memory layer."""
        return self.backbone.head_dim

    @property
    def memory_share(self) -> Tensor:
        """(H,): the sigmoid of the gate. With ``fusion="gate"`` the share every token that finds something gives."""
        return torch.sigmoid(self.memory_gate.detach().float())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """All that training may change."""
        return [p for p in self.parameters() if p.requires_grad]

    def trainable_parameter_names(self) -> list[str]:
        """Names of all that training may change."""
        return [name for name, p in self.named_parameters() if p.requires_grad]

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.backbone.model.get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.backbone.model.get_output_embeddings())

    # -- running -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        memory: Memory | None = None,
        memory_rows: Tensor | None = None,
        explain: bool | list[Explanation] = False,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> LongMemOutput:
        """Predict the next token of every position from its segment and from memory.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 at pads (either side).
            labels: (B, T), shifted inside, -100 ignored; gives ``loss``, the mean cross entropy in nats.
            memory: what to search, or None. It is only read; write ``out.kv`` after ``backward``.
            memory_rows: (B,) the bank row of every batch row; None is row b for batch row b.
            explain: also return which chunks every token and head read; a list takes them too, as in ``LongMem``.
            position_ids: (B, T), for backbones that take them; others need none.
            logits_to_keep: positions from the end that get logits, or which ones; 0 is all.
            **kwargs: go to the backbone's own forward (past_key_values, use_cache, ...).

        Raises:
            MemoryBankError: if the memory was written by another backbone or layer.
        """
        retrieve = retriever(self, memory, memory_rows)
        side = SideRun(explain=explain is not False)
        asked = self.backbone.accepted(position_ids=position_ids, logits_to_keep=logits_to_keep)
        with self.backbone.splice() as run, self.reader.reading(retrieve, self.memory_gate, side):
            out = self.backbone.model(
                input_ids=input_ids, attention_mask=attention_mask, labels=labels, **asked, **kwargs
            )
        explanation = None
        if memory is not None and side.parts is not None:
            assert side.retrieved is not None and side.share is not None
            explanation = Explanation.of(memory, side.retrieved, side.parts * side.share.unsqueeze(-1))
            if isinstance(explain, list):
                explain.append(explanation)
        return LongMemOutput(
            loss=out.loss,
            logits=out.logits,
            past_key_values=out.past_key_values,
            kv=run.kv(padding_of(attention_mask, input_ids)),
            retrieved=side.retrieved,
            share=side.share,
            explanation=explanation,
        )

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> AttentionKV:
        """What a segment (B, T) leaves in memory: runs the layers up to the memory layer and no further."""
        qkv = self.backbone.encode(input_ids, attention_mask)
        return AttentionKV(qkv.keys, qkv.values, None if attention_mask is None else attention_mask.bool())

    # -- making ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | PreTrainedModel,
        *,
        memory_layer: int | str | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        **config: Any,
    ) -> Self:
        """The model over a backbone, which it uses itself and does not copy.

        Args:
            backbone: hub id, path or an already loaded causal language model.
            memory_layer: 0-based; None is three quarters of the depth; ``"auto"`` measures, as in ``LongMem``.
            revision: hub revision of the backbone.
            dtype: of the backbone; None keeps that of its checkpoint.
            backbone_kwargs: more arguments for ``AutoModelForCausalLM.from_pretrained``.
            **config: fields of the model's config.

        Raises:
            BackboneError: if the backbone cannot be loaded or used.
            ConfigError: if settings contradict each other.
        """
        if isinstance(backbone, PreTrainedModel):
            name, model = backbone.config._name_or_path or None, backbone
            if dtype is not None:
                nn.Module.to(model, dtype)
        else:
            name, model = str(backbone), load_backbone(str(backbone), revision, dtype, **(backbone_kwargs or {}))
        made = cls.config_class(
            backbone_config=model.config, backbone_name_or_path=name, backbone_revision=revision, **config
        )
        if memory_layer == "auto":
            from longmem.modeling.copying import recommend_memory_layer

            # among the layers that a LongMem would choose from, so that both remember the same one
            memory_layer = recommend_memory_layer(
                model, stride=LongMemConfig().stride, chunk_size=made.chunk_size, num_chunks=max(1, made.num_chunks)
            )
        made.memory_layer = cast("int | None", memory_layer)
        return cls(made, model)
