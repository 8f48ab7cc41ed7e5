"""``MemTRM``: a Memorizing Transformer (Wu et al., 2022), the baseline that the paper compares with.

The backbone itself is trained while one of its layers reads memory. Writer and reader are the same changing weights,
so keys in memory are older than the queries that search them: they go stale, which LongMem's frozen backbone avoids.
Search, memory attention and gate are LongMem's own, so that nothing else differs: chunks of ``chunk_size`` tokens, and
queries and keys as the family computes them, without the normalisation of the original.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from longmem.config import MemTRMConfig
from longmem.errors import BackboneError, CheckpointError, ConfigError, first_line
from longmem.modeling.augmented import AugmentedLM
from longmem.modeling.fingerprint import fingerprint_of
from longmem.modeling.loading import Loading, check_arguments, resolve_folder
from longmem.modeling.memory_lm import check_saving
from longmem.modeling.placement import check_trainable
from longmem.modeling.weights import write_trainer_index

WEIGHTS = "memory_gate.safetensors"
BACKBONE = "backbone"


class MemTRM(AugmentedLM):
    """The whole backbone and a gate per head, trained with their memory.

    While it is trained, a bank holds what older weights wrote, so give that bank no fingerprint
    (``MemoryBank.for_model(model, fingerprint=None)``). After ``eval()`` the fingerprint is that of the weights as they
    are then, and banks that were written before it are refused.

    Args:
        config: its ``gate`` is where the gates start.
        backbone: what training starts from; it is changed.

    Raises:
        BackboneError: if the backbone or the memory layer cannot be used, or the backbone cannot be trained because it
            is quantised or its weights are kept elsewhere.
    """

    config_class = MemTRMConfig
    supports_gradient_checkpointing = True
    frozen: ClassVar[bool] = False

    def __init__(
        self, config: MemTRMConfig, backbone: PreTrainedModel | None = None, *, fingerprint: str | None = None
    ) -> None:
        if backbone is not None:
            check_trainable(backbone)
        super().__init__(config, backbone, fingerprint=fingerprint)
        self.memory_gate = nn.Parameter(self.gate_logits().to(self.backbone.model.dtype))
        self._trained_since = False
        if self.config.start_fingerprint is None:
            self.config.start_name_or_path = self.config.backbone_name_or_path
            self.config.start_fingerprint = self.fingerprint
        self.train(self.backbone.model.training)

    @property
    def fingerprint(self) -> str:
        """Of the weights that run; in training mode, as they were when it began."""
        if self._trained_since and not self.training:
            self.config.backbone_fingerprint = self.backbone.fingerprint()
            self._trained_since, self._also_known = False, None
        return super().fingerprint

    def train(self, mode: bool = True) -> MemTRM:
        """Puts the whole model in training mode, the backbone and its dropout too."""
        self._trained_since = mode or self._trained_since
        super().train(mode)
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Recompute every layer in backward but those that read memory."""
        model, layers = self.backbone.model, self.backbone.family.layers
        apart = all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)
        if not model.supports_gradient_checkpointing or not apart:
            raise ConfigError(
                f"optim.gradient_checkpointing is true, but {type(model).__name__} cannot recompute layer by layer; "
                "set it to false and take fewer optim.rows with more optim.accumulate"
            )
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable(gradient_checkpointing_kwargs)
        # recomputed outside of the forward, they would not find their memory
        for layer in self.memory_layers:
            layers[layer].gradient_checkpointing = False  # type: ignore[assignment]
        self.backbone.rebuild()

    def gradient_checkpointing_disable(self) -> None:
        model = self.backbone.model
        self.backbone.rebuild()
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Write all that was trained: ``backbone/``, a causal LM that loads by itself, and memory_gate.safetensors.

        config.json, which makes the folder a checkpoint, comes last and names the fingerprint of those weights.
        Arguments are those of ``LongMem.save_pretrained``.
        """
        check_saving(kwargs)
        folder = Path(save_directory)
        given, language_model = state_dict or {}, self.backbone.model
        # tied weights are there once; the other names are given back when they are loaded
        weights = {n: given.get(f"backbone.model.{n}", p.detach()) for n, p in language_model.named_parameters()}
        others = {n for n, _ in language_model.named_parameters(remove_duplicate=False)}
        buffers = {n: tensor for n, tensor in language_model.state_dict().items() if n not in others}
        gate = given.get("memory_gate", self.memory_gate.detach())
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{BACKBONE}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shards = {k: v for k, v in kwargs.items() if k == "max_shard_size"}
        language_model.save_pretrained(partial, state_dict={**weights, **buffers}, **shards)
        (folder / "config.json").unlink(missing_ok=True)
        shutil.rmtree(folder / BACKBONE, ignore_errors=True)
        partial.replace(folder / BACKBONE)
        save_file({"memory_gate": gate.to("cpu").contiguous()}, folder / WEIGHTS)
        weight_map = {"memory_gate": WEIGHTS}
        for file in sorted((folder / BACKBONE).glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                weight_map |= {f"backbone.model.{name}": f"{BACKBONE}/{file.name}" for name in list(tensors.keys())}
        write_trainer_index(folder, weight_map)
        self.config.backbone_fingerprint = fingerprint_of(language_model, weights)
        # the checkpoint's backbone is its own copy, wherever this model's came from
        self._save_config(folder, backbone_name_or_path=BACKBONE, backbone_revision=None, backbone_kwargs={})

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        config: MemTRMConfig | None = None,
        **kwargs: Any,
    ) -> MemTRM:
        """Load what ``save_pretrained`` wrote, in eval mode; arguments and errors are those of ``LongMem``."""
        loading, rest = Loading.split(kwargs, revision=revision, dtype=dtype, backbone_kwargs=backbone_kwargs)
        check_arguments("from_pretrained", rest)
        folder = resolve_folder(str(pretrained_model_name_or_path), revision)
        try:
            gate = load_file(folder / WEIGHTS)["memory_gate"]
            _, made, backbone, fingerprint = cls._load(folder, config, None, loading)
        except (OSError, SafetensorError, ValueError, KeyError, BackboneError) as problem:
            raise CheckpointError(
                f"{folder} is not a complete MemTRM checkpoint ({first_line(problem)}); "
                f"it needs config.json, {WEIGHTS} and {BACKBONE}/ as written by save_pretrained"
            ) from problem
        model = cls(made, backbone.eval(), fingerprint=fingerprint)  # type: ignore[arg-type]
        if gate.shape != model.memory_gate.shape:
            raise CheckpointError(
                f"{folder / WEIGHTS} has gates for {tuple(gate.shape)} heads, the backbone has {model.num_heads}; "
                "the checkpoint is damaged or of two runs, save it again"
            )
        with torch.no_grad():
            model.memory_gate.copy_(gate)
        model.load_generation_config(folder)
        return model


AutoConfig.register("memtrm", MemTRMConfig, exist_ok=True)
AutoModelForCausalLM.register(MemTRMConfig, MemTRM, exist_ok=True)
