"""``LongMem``: a frozen backbone and its SideNet as one transformers model (Wang et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longmem.config import LongMemConfig
from longmem.errors import CheckpointError, first_line
from longmem.modeling.backbone import BackboneRun
from longmem.modeling.loading import Loading, check_arguments, resolve_folder
from longmem.modeling.memory_lm import MemoryLM, check_saving
from longmem.modeling.sidenet import SideNet
from longmem.modeling.weights import SHARD_SIZE, WEIGHTS, read_weights, write_weights


class LongMem(MemoryLM):
    """A causal language model with a long-term memory (paper, sections 3.1 to 3.3).

    Args:
        config: its ``memory_layers`` may be None (the paper's three quarters of the depth).
        backbone: the frozen model; it is used as it is and never changed.
        side_dtype: dtype of the SideNet; None is the backbone's.
        fingerprint: the backbone's, where it is known already; None computes it.

    Raises:
        BackboneError: if the backbone or a memory layer cannot be used.
    """

    config_class = LongMemConfig
    saved_below = "sidenet."
    base_model_prefix = "longmem"
    supports_gradient_checkpointing = True

    def __init__(
        self,
        config: LongMemConfig,
        backbone: PreTrainedModel | None = None,
        *,
        side_dtype: torch.dtype | None = None,
        fingerprint: str | None = None,
    ) -> None:
        super().__init__(config, backbone, fingerprint=fingerprint)
        self.sidenet = SideNet(self.backbone, cast(LongMemConfig, self.config))
        self.sidenet.to(side_dtype or self.backbone.model.dtype)

    def read(self, run: BackboneRun, side_hidden: list[Tensor] | None = None) -> Tensor:
        """States (B, T, C) for the head: the SideNet's, after its own final norm."""
        final = self.sidenet(self.backbone, run, side_hidden)
        last = run.inputs[self.backbone.num_layers]
        # the head expects the dtype and device of the backbone's last layer; the SideNet may have others
        return self.backbone.finish(final.to(last), self.sidenet.final_norm)

    @property
    def memory_gate(self) -> Tensor:  # type: ignore[override]
        """(n*H,) gate logits, layer by layer."""
        return self.sidenet.memory_gate

    @property
    def augmented_layers(self) -> tuple[int, ...]:
        """For each memory layer, the 0-based SideNet layer that searches its keys."""
        return self.sidenet.augmented_layers

    @property
    def augmented_layer(self) -> int:
        """The first of them; in the paper there is one."""
        return self.augmented_layers[0]

    def train(self, mode: bool = True) -> LongMem:
        """Puts the SideNet in training mode; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.train(False)
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Recompute the SideNet's layers in backward. Write memory only after ``backward``."""
        self.sidenet.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.sidenet.gradient_checkpointing = False

    @classmethod
    def from_backbone(
        cls, backbone: str | Path | nn.Module, *, side_dtype: torch.dtype | None = None, **settings: Any
    ) -> LongMem:
        """A frozen backbone with a fresh SideNet; see ``MemoryLM.from_backbone``.

        Args:
            side_dtype: of the SideNet; None is the backbone's.
        """
        model = super().from_backbone(backbone, **settings)
        if side_dtype is not None:
            model.sidenet.to(side_dtype)
        return model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = SHARD_SIZE,
        **kwargs: Any,
    ) -> None:
        """Write the SideNet alone: config.json, which names the backbone and its fingerprint, and sidenet.safetensors.

        config.json makes the folder a checkpoint: it goes first and comes last, so a save that is cut short, also one
        over an older checkpoint, is not taken for one.

        Args:
            save_directory: the folder.
            state_dict: weights to write in place of the model's own, by their names in it: those gathered from the
                processes among which they are divided.
            max_shard_size: bytes of a file, or text such as ``"200MB"``; larger weights are written as
                sidenet-00001-of-0000N.safetensors with an index, sidenet.safetensors.index.json.
        """
        check_saving(kwargs)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        given = state_dict or {}
        mine = {name: given.get(f"sidenet.{name}", tensor) for name, tensor in self.sidenet.state_dict().items()}
        (folder / "config.json").unlink(missing_ok=True)
        about = {"backbone_fingerprint": self.fingerprint}
        write_weights(mine, folder, max_shard_size=max_shard_size, metadata=about)
        self._save_config(folder)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        backbone: str | Path | nn.Module | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        side_dtype: torch.dtype | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        config: LongMemConfig | None = None,
        **kwargs: Any,
    ) -> LongMem:
        """Load a SideNet, and the backbone that it names.

        Args:
            pretrained_model_name_or_path: folder written by ``save_pretrained``, or a hub id.
            backbone: path or model to use in place of the one named. The same weights in another precision are taken
                with a warning, other weights are refused.
            revision: of a hub id.
            dtype: of the backbone.
            side_dtype: of the SideNet; None is the backbone's.
            backbone_kwargs: more arguments for the backbone's ``AutoModelForCausalLM.from_pretrained``.
            config: in place of the one in the folder.
            **kwargs: the same arguments, one by one: ``device_map``, ``attn_implementation``, ...

        Raises:
            CheckpointError: if the checkpoint is incomplete or damaged, or belongs to another backbone.
            BackboneError: if the backbone cannot be loaded.
            ConfigError: if an argument is not known.
        """
        loading, rest = Loading.split(kwargs, revision=revision, dtype=dtype, backbone_kwargs=backbone_kwargs)
        check_arguments("from_pretrained", rest)
        folder = resolve_folder(str(pretrained_model_name_or_path), revision)
        try:
            tensors = read_weights(folder)
        except (OSError, SafetensorError, ValueError) as problem:
            raise CheckpointError(
                f"{folder} is not a complete LongMem checkpoint ({first_line(problem)}); "
                f"it needs config.json and {WEIGHTS} as written by save_pretrained"
            ) from problem
        _, made, model_of, fingerprint = cls._load(folder, config, backbone, loading)
        model = cls(cast(LongMemConfig, made), model_of, side_dtype=side_dtype, fingerprint=fingerprint)
        missing, unexpected = model.sidenet.load_state_dict(tensors, strict=False)
        if missing or unexpected:
            raise CheckpointError(
                f"{folder / WEIGHTS} does not fit its config: missing {missing[:3]}, unexpected {unexpected[:3]}; "
                "the checkpoint is damaged or of another version"
            )
        model.load_generation_config(folder)
        model.train(False)
        return model


AutoConfig.register("longmem", LongMemConfig, exist_ok=True)
AutoModelForCausalLM.register(LongMemConfig, LongMem, exist_ok=True)
