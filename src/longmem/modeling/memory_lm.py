"""``MemoryLM``: what LongMem and the baselines without a SideNet share.

``forward`` reads memory and never writes it; the caller writes ``out.kv`` afterwards.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from longmem.config import LongMemConfig, LongMemGenerationConfig, MemoryConfig
from longmem.errors import BackboneError
from longmem.generation.page import Explanation
from longmem.generation.window import MemoryGenerationMixin
from longmem.modeling.backbone import Backbone, BackboneRun
from longmem.modeling.checkpoints import Checkpointed
from longmem.modeling.families import Family
from longmem.modeling.reading import LayerRead, Reading
from longmem.modeling.weights import legacy_fingerprint, place_of
from longmem.types import AttentionKV, Memory


@dataclass
class LongMemOutput(CausalLMOutputWithPast):
    """The backbone's output with what memory needs.

    Attributes:
        kv: position-free keys and values of the n memory layers, (B, n*Hkv, T, D); write them with
            ``bank.add(out.kv)``.
        reads: for each memory layer, what was found in it and the share that memory got; None without memory.
        share: that of the first memory layer.
        explanation: what each token and head read, with ``explain=True``.
    """

    kv: AttentionKV | None = None
    reads: tuple[LayerRead, ...] | None = None
    share: Tensor | None = None
    explanation: Explanation | None = None


class MemoryLM(Checkpointed, MemoryGenerationMixin):
    """A causal language model that reads memory, over a backbone that runs unmodified.

    Args:
        config: its ``memory_layers`` may be None (the paper's three quarters of the depth).
        backbone: the model that runs.
        fingerprint: the backbone's, where it is known already; None computes it.

    Raises:
        BackboneError: if the backbone or a memory layer cannot be used.
    """

    config_class: type[MemoryConfig] = MemoryConfig
    frozen: ClassVar[bool] = True
    """Whether the backbone is kept from training; False in ``MemTRM``."""
    memory_gate: Tensor
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(
        self, config: MemoryConfig, backbone: PreTrainedModel | None = None, *, fingerprint: str | None = None
    ) -> None:
        if backbone is None:
            name = type(self).__name__
            raise BackboneError(
                f"{name} needs the backbone itself, not only its config; "
                f"use {name}.from_backbone(...) or {name}.from_pretrained(...)"
            )
        config = copy.deepcopy(config)
        config.backbone_config = backbone.config
        if config.memory_layers is None:
            stride = getattr(config, "stride", LongMemConfig().stride)
            config.memory_layers = (Family.of(backbone).default_memory_layer(stride),)
        super().__init__(config)
        self.backbone = Backbone(backbone, config.memory_layers, frozen=self.frozen)
        config.backbone_fingerprint = fingerprint or self.backbone.fingerprint
        # models with a recurrent state cannot take tokens back: generate refuses what needs that
        self._is_stateful = bool(getattr(backbone, "_is_stateful", False))
        self._also_known: set[str] | None = None
        self.config = config
        self.generation_config = LongMemGenerationConfig.over(backbone.generation_config)

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
        num_items_in_batch: Tensor | int | None = None,
        keep: bool = True,
        **options: Any,
    ) -> LongMemOutput:
        """Predict the next token of every position from its segment and from memory.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 at pads (either side).
            labels: (B, T), shifted inside, -100 ignored; gives ``loss``, the mean cross entropy in nats.
            memory: what to search, or None. It is only read; write ``out.kv`` after ``backward``.
            memory_rows: (B,) the bank row of every batch row; None is row b for batch row b.
            explain: also return which chunks every token and head read, and how much of each. If it is a list, each
                call also appends its ``Explanation`` to it. So ``generate(..., explain=readings)`` fills ``readings``:
                the last position of call i chose the i-th new token.
            position_ids: (B, T), for backbones that take them; others need none.
            logits_to_keep: positions from the end that get logits, or which ones; 0 is all.
            num_items_in_batch: labels in all parts of an accumulated batch, by which the sum of losses is divided.
            keep: give ``kv``; ``generate`` writes none of it.
            **options: go to the backbone (past_key_values, use_cache, output_hidden_states, ...).

        Raises:
            MemoryBankError: if the memory was written by another backbone or other layers.
        """
        reading = Reading.of(self, memory, memory_rows, explain is not False)
        # 1. the backbone runs as it is; the run has what each of its layers was given, and the keys to remember
        run = self.backbone.run(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, reading=reading, **options
        )
        # 2. in LongMem the SideNet goes through the run once more, beside it, and reads memory: `SideNet.forward`
        hidden = self.read(run)
        # 3. the backbone's own head
        last = {"labels": labels, "logits_to_keep": logits_to_keep, "num_items_in_batch": num_items_in_batch}
        out = self.backbone.head(hidden, run, **last)

        reads = None if reading is None else tuple(reading.reads.values())
        explanation = None if memory is None or not reads or explain is False else Explanation.of(memory, reads)
        if isinstance(explain, list) and explanation is not None:
            explain.append(explanation)
        return LongMemOutput(
            loss=out.loss,
            logits=out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            kv=self.kept(run, input_ids, attention_mask) if keep else None,
            reads=reads,
            share=reads[0].share if reads else None,
            explanation=explanation,
        )

    def read(self, run: BackboneRun) -> Tensor:
        """The states (B, T, C) that the head takes, from a run of the backbone.

        ``LongMem`` reads memory here, as ``run.reading`` says. The baselines have read it inside the run, so they take
        the run's own last state.
        """
        assert run.output is not None
        return cast(Tensor, run.output.last_hidden_state)

    def kept(self, run: BackboneRun, input_ids: Tensor | None, attention_mask: Tensor | None) -> AttentionKV:
        """The keys and values to write after a run. They depend on its text alone, not on what it read."""
        return run.kv(_padding(attention_mask, input_ids))

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> AttentionKV:
        """The keys and values of a segment (B, T). The backbone runs up to its last memory layer and no further."""
        return self.backbone.encode(input_ids, attention_mask).kv(_padding(attention_mask, input_ids))

    # -- what it is made of ------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """The backbone's; a bank or SideNet with another one is refused."""
        return cast(str, self.config.backbone_fingerprint)

    def accepts(self, fingerprint: str) -> bool:
        """Whether keys and values written under this fingerprint are those of this model's backbone."""
        if fingerprint == self.fingerprint:
            return True
        if self._also_known is None:
            self._also_known = {self.backbone.fingerprint, legacy_fingerprint(self.backbone.model)}
        return fingerprint in self._also_known

    @property
    def device(self) -> torch.device:
        """Where inputs go: to the first layer, also where weights are kept elsewhere until needed."""
        return place_of(self.backbone.model)

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """Where accelerate put the backbone's parts; there is none where it did not."""
        return cast("dict[str, Any]", self.backbone.model.hf_device_map)

    @property
    def memory_device(self) -> torch.device:
        """Where memory is searched: the device of the first layer that reads it."""
        return self.memory_gate.device

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """The 0-based backbone layers whose keys and values are remembered."""
        return self.backbone.memory_layers

    @property
    def memory_layer(self) -> int:
        """m: the first of them; in the paper there is one."""
        return self.memory_layers[0]

    @property
    def num_heads(self) -> int:
        """H."""
        return int(self.backbone.family.config.num_attention_heads)

    @property
    def memory_heads(self) -> int:
        """Hkv, key/value heads of one memory layer."""
        return self.backbone.family.kv_heads(self.memory_layer)

    @property
    def memory_head_dim(self) -> int:
        """D of the memory layers."""
        return self.backbone.family.head_dim(self.memory_layer)

    @property
    def memory_share(self) -> Tensor:
        """(n*H,): the sigmoid of the gate; with ``fusion="gate"`` memory's share for tokens that find something."""
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


def _padding(attention_mask: Tensor | None, input_ids: Tensor | None) -> Tensor | None:
    """(B, T) bool, False at the pads among the T tokens of a call; None where all are real.

    Also None for masks (B, 1, T, slots), which generation with a static cache passes: it keeps nothing.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or input_ids is None:
        return None
    return attention_mask[:, -input_ids.shape[1] :].bool()
