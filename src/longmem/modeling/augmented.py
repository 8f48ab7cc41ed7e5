"""A causal language model some of whose own layers read memory: what the two baselines without a SideNet share.

The paper's LongMem keeps the model that writes memory apart from the one that reads it. Here they are one and the same:
a memory layer attends to its segment and to what its position-free queries find, and the layers above go on from there.
Layers up to the first memory layer never see memory, so with one layer what a segment leaves in memory depends on that
segment alone. Keys of a later memory layer would depend on what the earlier ones had read: they are encoded apart.
"""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longmem.config import AugmentedConfig
from longmem.modeling.backbone import BackboneRun, current_run
from longmem.modeling.gates import TokenGate
from longmem.modeling.memory_lm import MemoryLM
from longmem.modeling.placement import place_of
from longmem.modeling.probe import QKV, Call
from longmem.modeling.reading import MemoryReader
from longmem.types import AttentionKV


class AugmentedLM(MemoryLM):
    """The backbone with memory attention at its memory layers; see ``MemTRM`` and ``TrainingFree``."""

    config_class: type[AugmentedConfig] = AugmentedConfig
    base_model_prefix = "backbone"

    def __init__(
        self, config: AugmentedConfig, backbone: PreTrainedModel | None = None, *, fingerprint: str | None = None
    ) -> None:
        super().__init__(config, backbone, fingerprint=fingerprint)
        self.backbone.attach = self._attach

    def kept(self, run: BackboneRun, input_ids: Tensor | None, attention_mask: Tensor | None) -> AttentionKV:
        """What a run leaves in memory: with several layers that read, the text is encoded once more without memory.

        Steps of a cached generation do not pay for that: what they give is not written.
        """
        if run.reading is None or len(self.memory_layers) == 1 or input_ids is None:
            return super().kept(run, input_ids, attention_mask)
        cache = run.output.get("past_key_values") if run.output is not None else None
        if cache is not None and cache.get_seq_length() > input_ids.shape[1]:
            return super().kept(run, input_ids, attention_mask)
        return self.encode(input_ids, attention_mask)

    def gate_logits(self) -> Tensor:
        """(n*H,) logits of the shares in the config, infinite at 0 and 1."""
        gates = cast(AugmentedConfig, self.config).gates
        shares = torch.tensor(gates, dtype=torch.float64).expand(self.num_heads * len(self.memory_layers))
        return torch.logit(shares).float().to(place_of(self.backbone.family.layers[self.memory_layer]))

    def reader_gate(self, place: int) -> Tensor | TokenGate:
        """What decides the shares of one memory layer, by its place: the logits (H,) of its heads."""
        return self.gate_of(place)

    def _attach(self, attention: nn.Module, layer: int) -> None:
        """Let the attention of a memory layer, in the backbone's mirror, read memory."""
        place = self.memory_layers.index(layer)
        gate = functools.partial(self.reader_gate, place)
        probe = functools.partial(_found_before, layer)
        MemoryReader(attention, self.backbone.family, layer, place, self.config.fusion, gate, probe)


def _found_before(layer: int, call: Call) -> QKV:
    """The projections that the backbone's own hook, registered earlier, has just computed."""
    run = current_run()
    assert run is not None
    return run.qkv[layer]
