"""The baselines without a SideNet: a causal language model some of whose own layers read memory.

The paper's LongMem keeps the model that writes memory apart from the one that reads it. Here they are one and the same:
a memory layer attends to its segment and to what its position-free queries find, and the layers above go on from there.
Layers up to the first memory layer never see memory, so with one layer what a segment leaves in memory depends on that
segment alone. Keys of a later memory layer would depend on what the earlier ones had read: they are encoded apart.

``MemTRM`` trains the whole model with its memory. ``TrainingFree`` trains nothing, or gates alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longmem.config import AugmentedConfig, MemoryConfig, MemTRMConfig, TrainingFreeConfig
from longmem.errors import BackboneError
from longmem.modeling.backbone import BackboneRun, current_run
from longmem.modeling.families import QKV
from longmem.modeling.memory_lm import MemoryLM
from longmem.modeling.reading import MemoryReader, TokenGate
from longmem.modeling.weights import fingerprint_of, packed_by, place_of
from longmem.types import AttentionKV

BACKBONE = "backbone"
"""The folder of a MemTRM checkpoint with the model that was trained, which loads by itself."""


class AugmentedLM(MemoryLM):
    """The backbone with memory attention at its memory layers; see ``MemTRM`` and ``TrainingFree``."""

    config_class: type[AugmentedConfig] = AugmentedConfig
    base_model_prefix = "backbone"

    def __init__(
        self, config: AugmentedConfig, backbone: PreTrainedModel | None = None, *, fingerprint: str | None = None
    ) -> None:
        super().__init__(config, backbone, fingerprint=fingerprint)
        self.gates: nn.ModuleList | None = None
        self.backbone.attach = self._attach

    def kept(self, run: BackboneRun, input_ids: Tensor | None, attention_mask: Tensor | None) -> AttentionKV:
        """What a run leaves in memory: with several layers that read, the text is encoded once more without memory.

        Steps of a loop with a cache do not pay for that: what they give is not written. ``generate`` keeps nothing.
        """
        cache = run.output.get("past_key_values") if run.output is not None else None
        is_step = input_ids is None or (cache is not None and cache.get_seq_length() > input_ids.shape[1])
        if run.reading is None or len(self.memory_layers) == 1 or is_step:
            return super().kept(run, input_ids, attention_mask)
        return self.encode(cast(Tensor, input_ids), attention_mask)

    def _gate_logits(self) -> Tensor:
        """(n*H,) logits of the shares in the config, infinite at 0 and 1."""
        gates = cast(AugmentedConfig, self.config).gates
        shares = torch.tensor(gates, dtype=torch.float64).expand(self.num_heads * len(self.memory_layers))
        return torch.logit(shares).float().to(place_of(self.backbone.family.layers[self.memory_layer]))

    def _attach(self, attention: nn.Module, layer: int) -> None:
        """Let the attention of a memory layer, in the backbone's mirror, read memory."""

        def projected(*_: Any) -> QKV:  # the backbone's own hook, registered earlier, has just computed them
            run = current_run()
            assert run is not None
            return run.qkv[layer]

        place = self.memory_layers.index(layer)
        MemoryReader(attention, self.backbone.family, layer, place, self.config.fusion, self, projected)


class MemTRM(AugmentedLM):
    """A Memorizing Transformer (Wu et al., 2022), the paper's baseline: backbone and gates, trained with their memory.

    Writer and reader are the same changing weights, so keys in memory are older than the queries that search them: they
    go stale, which LongMem's frozen backbone avoids. Search, memory attention and gate are LongMem's own, so that
    nothing else differs: chunks of ``chunk_size`` tokens, and queries and keys as the family computes them, without the
    normalisation of the original.

    While it is trained, a bank holds what older weights wrote, so give that bank no fingerprint
    (``MemoryBank.for_model(model, fingerprint=None)``). After ``eval()`` the fingerprint is that of the weights as they
    are then, and banks that were written before it are refused.

    Raises:
        BackboneError: as ``MemoryLM``, and if the backbone is quantised or its weights are kept elsewhere.
    """

    config_class = MemTRMConfig
    weights_file = "memory_gate.safetensors"
    weights_prefix = "backbone.model."
    frozen: ClassVar[bool] = False

    def __init__(
        self, config: MemTRMConfig, backbone: PreTrainedModel | None = None, *, fingerprint: str | None = None
    ) -> None:
        if backbone is not None and (packed_by(backbone) or any(weight.is_meta for weight in backbone.parameters())):
            raise BackboneError(
                "MemTRM trains the backbone itself, and the weights of this one are quantised or kept elsewhere until "
                "they are needed; load it unquantised, onto its devices"
            )
        super().__init__(config, backbone, fingerprint=fingerprint)
        self.memory_gate = nn.Parameter(self._gate_logits().to(self.backbone.model.dtype))
        self._trained_since = False
        if self.config.start_fingerprint is None:
            self.config.start_name_or_path = self.config.backbone_name_or_path
            self.config.start_fingerprint = self.fingerprint
        self.train(self.backbone.model.training)

    @property
    def fingerprint(self) -> str:
        """Of the weights that run; in training mode, as they were when it began."""
        if self._trained_since and not self.training:
            self.config.backbone_fingerprint = fingerprint_of(self.backbone.model)
            self._trained_since, self._also_known = False, None
        return super().fingerprint

    def train(self, mode: bool = True) -> MemTRM:
        """Puts the whole model in training mode, the backbone and its dropout too."""
        self._trained_since = mode or self._trained_since
        super().train(mode)
        return self

    def own_weights(self) -> dict[str, Tensor]:
        """The gates; the backbone is a model by itself."""
        return {"memory_gate": self.memory_gate.detach()}

    def write_weights(self, folder: Path, given: Mapping[str, Tensor], max_shard_size: int | str) -> None:
        """``backbone/``, a causal LM that loads by itself, and the gates."""
        model = self.backbone.model
        # tied weights are there once; the other names are given back when they are loaded
        weights = {n: given.get(f"backbone.model.{n}", p.detach()) for n, p in model.named_parameters()}
        others = {n for n, _ in model.named_parameters(remove_duplicate=False)}
        buffers = {n: tensor for n, tensor in model.state_dict().items() if n not in others}
        shutil.rmtree(folder / BACKBONE, ignore_errors=True)
        model.save_pretrained(folder / BACKBONE, state_dict={**weights, **buffers}, max_shard_size=max_shard_size)
        self.config.backbone_fingerprint = fingerprint_of(model, weights)
        super().write_weights(folder, given, max_shard_size)

    def weight_files(self, folder: Path) -> list[Path]:
        """The gates' and the backbone's."""
        return [*super().weight_files(folder), *sorted((folder / BACKBONE).glob("*.safetensors"))]

    def saved_config(self) -> MemoryConfig:
        """The checkpoint's backbone is its own copy, wherever this model's came from."""
        config = super().saved_config()
        config.update({"backbone_name_or_path": BACKBONE, "backbone_revision": None, "backbone_kwargs": {}})
        return config


class TrainingFree(AugmentedLM):
    """A frozen backbone that reads memory at some of its own layers; it reads the banks of a LongMem over the same.

    ``TrainingFree.from_backbone(name, gate=0.1)``: 0 is the backbone alone, bit for bit. With ``fusion="token"`` its
    only trainable parameters are ``gates``, a ``TokenGate`` for each memory layer (``longmem.training.calibrate``).
    """

    config_class = TrainingFreeConfig
    weights_file = "gates.safetensors"
    weights_prefix = "gates."

    def __init__(
        self, config: TrainingFreeConfig, backbone: PreTrainedModel | None = None, *, fingerprint: str | None = None
    ) -> None:
        super().__init__(config, backbone, fingerprint=fingerprint)
        self.register_buffer("memory_gate", self._gate_logits(), persistent=False)
        if self.config.fusion == "token":
            layers = [self.backbone.family.layers[layer] for layer in self.memory_layers]
            biases = self.memory_gate.view(len(layers), -1)
            self.gates = nn.ModuleList(
                TokenGate(self.num_heads, self.memory_head_dim, bias=bias).to(place_of(layer))
                for layer, bias in zip(layers, biases, strict=True)
            )
        self.train(False)


for config, model in ((MemTRMConfig, MemTRM), (TrainingFreeConfig, TrainingFree)):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
