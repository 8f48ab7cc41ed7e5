"""``TrainingFree``: memory attention on the plain frozen backbone, its gate given, nothing trained.

What a backbone gains from memory before anybody trains anything. It reads the same banks and stores as a LongMem over
the same backbone and layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longmem.config import TrainingFreeConfig
from longmem.modeling.augmented import AugmentedLM
from longmem.modeling.loading import Loading, check_arguments
from longmem.modeling.memory_lm import check_saving


class TrainingFree(AugmentedLM):
    """A frozen backbone that reads memory at some of its own layers.

    ``TrainingFree.from_backbone(name, gate=0.1)``: 0 is the backbone alone, bit for bit.

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
        self.train(False)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config.json alone: the settings, and the backbone by name and fingerprint."""
        check_saving(kwargs)
        self._save_config(Path(save_directory))

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
        """Load settings and the backbone that they name; arguments and errors are those of ``LongMem``."""
        loading, rest = Loading.split(kwargs, revision=revision, dtype=dtype, backbone_kwargs=backbone_kwargs)
        check_arguments("from_pretrained", rest)
        folder, made, model_of, fingerprint = cls._load(pretrained_model_name_or_path, config, backbone, loading)
        model = cls(made, model_of, fingerprint=fingerprint)  # type: ignore[arg-type]
        model.load_generation_config(folder)
        return model


AutoConfig.register("training_free", TrainingFreeConfig, exist_ok=True)
AutoModelForCausalLM.register(TrainingFreeConfig, TrainingFree, exist_ok=True)
