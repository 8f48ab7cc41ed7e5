"""``TrainingFree``: memory attention on the plain frozen backbone, its gate given, nothing trained.

What a backbone gains from memory before anybody trains anything. It reads the same banks and stores as a LongMem over
the same backbone and layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from longmem.config import TrainingFreeConfig
from longmem.errors import CheckpointError
from longmem.modeling.augmented import AugmentedLM
from longmem.modeling.loading import first_line, load_backbone, load_config, named_backbone, resolve_folder


class TrainingFree(AugmentedLM):
    """A frozen backbone that reads memory at one of its own layers.

    ``TrainingFree.from_backbone(name, gate=0.1)``: 0 is the backbone alone, bit for bit.

    Args:
        config: its ``gate`` is the share of every head, or one for each.
        backbone: it is used as it is and never changed.

    Raises:
        BackboneError: if the backbone or the memory layer cannot be used.
    """

    config_class = TrainingFreeConfig
    frozen: ClassVar[bool] = True

    def __init__(self, config: TrainingFreeConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config, backbone)
        self.register_buffer("memory_gate", self.gate_logits(), persistent=False)
        self.train(False)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config.json alone: the settings, and the backbone by name and fingerprint."""
        self.config.architectures = ["TrainingFree"]
        self.config.save_pretrained(save_directory)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        backbone: str | Path | PreTrainedModel | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        config: PreTrainedConfig | None = None,
        **kwargs: Any,
    ) -> TrainingFree:
        """Load settings and the backbone that they name.

        Args:
            pretrained_model_name_or_path: folder written by ``save_pretrained``, or a hub id.
            backbone: path or model to use in place of the one named; must have the same fingerprint.
            dtype: of the backbone.

        Raises:
            CheckpointError: if there are no settings, or they belong to another backbone.
            BackboneError: if the backbone cannot be loaded.
        """
        folder = resolve_folder(str(pretrained_model_name_or_path), revision)
        try:
            made = load_config(TrainingFreeConfig, folder) if config is None else config
        except (OSError, ValueError) as problem:
            raise CheckpointError(
                f"{folder} holds no training-free settings ({first_line(problem)}); "
                "it needs config.json as written by save_pretrained"
            ) from problem
        assert isinstance(made, TrainingFreeConfig)
        if not isinstance(backbone, PreTrainedModel):
            named = named_backbone(made.backbone_name_or_path, folder) if backbone is None else str(backbone)
            revision_of = made.backbone_revision if backbone is None else None
            quantised = getattr(made.backbone_config, "quantization_config", None)
            backbone = load_backbone(named, revision_of, dtype, quantised=quantised, **(backbone_kwargs or {}))
        model = cls(made, backbone)
        expected = made.backbone_fingerprint
        if expected is not None and model.fingerprint != expected:
            raise CheckpointError(
                f"{folder} was made for backbone {expected} ({made.backbone_name_or_path}), the backbone given is "
                f"{model.fingerprint}; pass the backbone that it names"
            )
        model.load_generation_config(folder)
        return model


AutoConfig.register("training_free", TrainingFreeConfig, exist_ok=True)
AutoModelForCausalLM.register(TrainingFreeConfig, TrainingFree, exist_ok=True)

import longmem.modeling.longmem  # noqa: E402, F401  whoever knows one of our models knows them all
