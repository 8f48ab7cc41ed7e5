"""``TrainingFree``: memory attention on the plain frozen backbone, without a SideNet.

What a backbone gains from memory before anybody trains anything, its gates given; or after a few thousand numbers were
calibrated (``fusion="token"``, see ``TokenGate`` and ``longmem.training.calibrate``). It reads the same banks and
stores as a LongMem over the same backbone and layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longmem.config import TrainingFreeConfig
from longmem.errors import CheckpointError, first_line
from longmem.modeling.augmented import AugmentedLM
from longmem.modeling.gates import TokenGate
from longmem.modeling.loading import Loading, check_arguments
from longmem.modeling.memory_lm import check_saving
from longmem.modeling.placement import place_of

GATES = "gates.safetensors"


class TrainingFree(AugmentedLM):
    """A frozen backbone that reads memory at some of its own layers.

    ``TrainingFree.from_backbone(name, gate=0.1)``: 0 is the backbone alone, bit for bit. With ``fusion="token"`` its
    only trainable parameters are ``gates``, a ``TokenGate`` for each memory layer.

    Args:
        config: its ``gate`` is the share of every head, or one for each.
        backbone: it is used as it is and never changed.
        fingerprint: by which the backbone goes where that is known; None computes it.

    Raises:
        BackboneError: if the backbone or a memory layer cannot be used.
    """

    config_class = TrainingFreeConfig

    def __init__(
        self, config: TrainingFreeConfig, backbone: PreTrainedModel | None = None, *, fingerprint: str | None = None
    ) -> None:
        super().__init__(config, backbone, fingerprint=fingerprint)
        self.register_buffer("memory_gate", self.gate_logits(), persistent=False)
        self.gates: nn.ModuleList | None = None
        if self.config.fusion == "token":
            family, places = self.backbone.family, range(len(self.memory_layers))
            gates = [TokenGate(self.num_heads, self.memory_head_dim, bias=self.gate_of(place)) for place in places]
            self.gates = nn.ModuleList(
                gate.to(place_of(family.layers[layer])) for gate, layer in zip(gates, self.memory_layers, strict=True)
            )
        self.train(False)

    def reader_gate(self, place: int) -> Tensor | TokenGate:
        return self.gate_of(place) if self.gates is None else cast(TokenGate, self.gates[place])

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config.json: the settings, and the backbone by name and fingerprint; and gates.safetensors."""
        check_saving(kwargs)
        folder = Path(save_directory)
        if self.gates is not None:
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.gates.state_dict().items()}
            save_file(tensors, folder / GATES, metadata={"format": "pt"})
        self._save_config(folder)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        backbone: str | Path | nn.Module | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        config: TrainingFreeConfig | None = None,
        **kwargs: Any,
    ) -> TrainingFree:
        """Load settings, gates and the backbone that is named; arguments and errors are those of ``LongMem``."""
        loading, rest = Loading.split(kwargs, revision=revision, dtype=dtype, backbone_kwargs=backbone_kwargs)
        check_arguments("from_pretrained", rest)
        folder, made, model_of, fingerprint = cls._load(pretrained_model_name_or_path, config, backbone, loading)
        model = cls(made, model_of, fingerprint=fingerprint)  # type: ignore[arg-type]
        if model.gates is not None:
            try:
                model.gates.load_state_dict(load_file(folder / GATES))
            except (OSError, SafetensorError, RuntimeError) as problem:
                raise CheckpointError(
                    f"{folder} is not a complete calibrated model ({first_line(problem)}); it needs config.json and "
                    f"{GATES} as written by save_pretrained"
                ) from problem
        model.load_generation_config(folder)
        return model


AutoConfig.register("training_free", TrainingFreeConfig, exist_ok=True)
AutoModelForCausalLM.register(TrainingFreeConfig, TrainingFree, exist_ok=True)
