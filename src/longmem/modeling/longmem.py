"""``LongMem``: a frozen backbone and its SideNet as one transformers model.

``forward`` reads memory and never writes it; the caller writes ``out.kv`` afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from longmem.config import LongMemConfig, LongMemGenerationConfig
from longmem.errors import BackboneError, CheckpointError
from longmem.modeling.backbone import Backbone, BackboneRun
from longmem.modeling.explain import Explanation
from longmem.modeling.generating import MemoryGenerationMixin
from longmem.modeling.loading import (
    default_memory_layer,
    first_line,
    load_backbone,
    load_config,
    named_backbone,
    resolve_folder,
)
from longmem.modeling.output import LongMemOutput, padding_of
from longmem.modeling.retrieving import retriever
from longmem.modeling.sidenet import SideNet, SideRun
from longmem.modeling.weights import SHARD_SIZE, WEIGHTS, read_weights, write_weights
from longmem.types import AttentionKV, Memory


class LongMem(PreTrainedModel, MemoryGenerationMixin):
    """A causal language model with a long-term memory (PAPER: sections 3.1 to 3.3).

    Args:
        config: its ``memory_layer`` may be None (the paper's three quarters of the depth).
        backbone: the frozen model; it is used as it is and never changed.
        side_dtype: dtype of the SideNet; None is the backbone's.

    Raises:
        BackboneError: if the backbone or the memory layer cannot be used.
    """

    config_class = LongMemConfig
    base_model_prefix = "longmem"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(
        self, config: LongMemConfig, backbone: PreTrainedModel | None = None, *, side_dtype: torch.dtype | None = None
    ) -> None:
        if backbone is None:
            raise BackboneError(
                "LongMem needs the backbone itself, not only its config; "
                "use LongMem.from_backbone(...) or LongMem.from_pretrained(...)"
            )
        config = copy.deepcopy(config)
        config.backbone_config = backbone.config
        if config.memory_layer is None:
            config.memory_layer = default_memory_layer(backbone, config.stride)
        super().__init__(config)
        self.backbone = Backbone(backbone, config.memory_layer)
        self.sidenet = SideNet(self.backbone, config)
        self.sidenet.to(side_dtype or backbone.dtype)
        config.backbone_fingerprint = self.backbone.fingerprint()
        self.config = config
        self.generation_config = LongMemGenerationConfig.over(backbone.generation_config)

    # -- what it is made of ------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Of the backbone; a bank or SideNet of another one is refused."""
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
        """Where memory is searched: the device of the SideNet layer that reads it."""
        return self.sidenet.memory_gate.device

    @property
    def memory_layer(self) -> int:
        """m: the 0-based backbone layer whose keys and values are remembered."""
        return self.backbone.memory_layer

    @property
    def augmented_layer(self) -> int:
        """The 0-based SideNet layer that reads memory."""
        return self.sidenet.augmented_layer

    @property
    def num_heads(self) -> int:
        """H."""
        return self.sidenet.reader.num_heads

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
        return torch.sigmoid(self.sidenet.memory_gate.detach().float())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """All that training may change: the SideNet."""
        return [p for p in self.parameters() if p.requires_grad]

    def trainable_parameter_names(self) -> list[str]:
        """Names of all that training may change."""
        return [name for name, p in self.named_parameters() if p.requires_grad]

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.backbone.model.get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.backbone.model.get_output_embeddings())

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

    # -- running -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        memory: Memory | None = None,
        memory_rows: Tensor | None = None,
        output_side_hidden: bool = False,
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
            output_side_hidden: also return the SideNet's states.
            explain: also return which chunks every token and head read, and how much of each. A list takes them too,
                one ``Explanation`` per call: the way to have them from ``generate(..., explain=readings)``, where the
                last position of call i chose the i-th new token.
            position_ids: (B, T), for backbones that take them; others need none.
            logits_to_keep: positions from the end that get logits, or which ones; 0 is all.
            **kwargs: go to the backbone's own forward (past_key_values, use_cache, ...).

        Raises:
            MemoryBankError: if the memory was written by another backbone.
        """
        retrieve = retriever(self, memory, memory_rows)
        side = SideRun(hidden=[] if output_side_hidden else None, explain=explain is not False)

        def hand_over(run: BackboneRun, final: Tensor) -> Tensor:
            return cast(Tensor, self.sidenet(self.backbone, run, final, retrieve, side)).to(final)

        with self.backbone.splice(hand_over, None if self.sidenet.final_norm is None else self._norm) as run:
            asked = self.backbone.accepted(position_ids=position_ids, logits_to_keep=logits_to_keep)
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
            side_hidden=None if side.hidden is None else tuple(side.hidden),
        )

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> AttentionKV:
        """What a segment (B, T) leaves in memory: runs the backbone up to its memory layer and no further."""
        qkv = self.backbone.encode(input_ids, attention_mask)
        return AttentionKV(qkv.keys, qkv.values, None if attention_mask is None else attention_mask.bool())

    def _norm(self, hidden: Tensor) -> Tensor:
        norm = self.sidenet.final_norm
        assert norm is not None
        place = next(norm.parameters()).device if self.sidenet.spread else None
        return cast(Tensor, norm(hidden.to(place, self.sidenet.memory_gate.dtype))).to(hidden.dtype)

    # -- making, saving, loading -------------------------------------------------------------------------------------

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | PreTrainedModel,
        *,
        memory_layer: int | str | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        side_dtype: torch.dtype | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        **config: Any,
    ) -> LongMem:
        """A frozen backbone with a fresh SideNet.

        Args:
            backbone: hub id, path or an already loaded causal language model.
            memory_layer: 0-based; None is three quarters of the depth; ``"auto"`` measures which layer's keys find what
                followed an earlier occurrence best.
            revision: hub revision of the backbone.
            dtype: of the backbone; None keeps that of its checkpoint.
            side_dtype: of the SideNet; None is the backbone's.
            backbone_kwargs: more arguments for ``AutoModelForCausalLM.from_pretrained``.
            **config: fields of ``LongMemConfig``.

        Raises:
            BackboneError: if the backbone cannot be loaded or used.
            ConfigError: if settings contradict each other.
        """
        if not isinstance(backbone, PreTrainedModel):
            name = str(backbone)
            model = load_backbone(name, revision, dtype, **(backbone_kwargs or {}))
        else:
            name, model = backbone.config._name_or_path or "", backbone
            if dtype is not None:
                nn.Module.to(model, dtype)
        stride = config.get("stride", 2)
        if memory_layer == "auto":
            from longmem.modeling.copying import recommend_memory_layer

            sizes = LongMemConfig(**{name: config[name] for name in ("chunk_size", "num_retrieved") if name in config})
            memory_layer = recommend_memory_layer(
                model,
                stride=stride,
                chunk_size=sizes.chunk_size,
                num_chunks=max(1, sizes.num_retrieved // sizes.chunk_size),
            )
        made = LongMemConfig(
            backbone_config=model.config,
            backbone_name_or_path=name or None,
            backbone_revision=revision,
            memory_layer=cast("int | None", memory_layer),
            **config,
        )
        return cls(made, model, side_dtype=side_dtype)

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
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        given = state_dict or {}
        mine = {name: given.get(f"sidenet.{name}", tensor) for name, tensor in self.sidenet.state_dict().items()}
        (folder / "config.json").unlink(missing_ok=True)
        about = {"backbone_fingerprint": self.fingerprint}
        write_weights(mine, folder, max_shard_size=max_shard_size, metadata=about)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(folder)
        self.config.architectures = ["LongMem"]
        self.config.save_pretrained(folder)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        backbone: str | Path | PreTrainedModel | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        side_dtype: torch.dtype | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        config: PreTrainedConfig | None = None,
        **kwargs: Any,
    ) -> LongMem:
        """Load a SideNet and, really, the backbone that it names.

        Args:
            pretrained_model_name_or_path: folder written by ``save_pretrained``, or a hub id.
            backbone: path or model to use in place of the one named; must have the same fingerprint.
            dtype: of the backbone.

        Raises:
            CheckpointError: if the checkpoint is incomplete or damaged, or belongs to another backbone.
            BackboneError: if the backbone cannot be loaded.
        """
        folder = resolve_folder(str(pretrained_model_name_or_path), revision)
        try:
            made = load_config(LongMemConfig, folder) if config is None else config
            tensors = read_weights(folder)
        except (OSError, SafetensorError, ValueError) as problem:
            raise CheckpointError(
                f"{folder} is not a complete LongMem checkpoint ({first_line(problem)}); "
                f"it needs config.json and {WEIGHTS} as written by save_pretrained"
            ) from problem
        assert isinstance(made, LongMemConfig)
        if not isinstance(backbone, PreTrainedModel):
            named = named_backbone(made.backbone_name_or_path, folder) if backbone is None else str(backbone)
            revision_of = made.backbone_revision if backbone is None else None
            quantised = getattr(made.backbone_config, "quantization_config", None)
            backbone = load_backbone(named, revision_of, dtype, quantised=quantised, **(backbone_kwargs or {}))
        expected = made.backbone_fingerprint
        # the copied layers are overwritten at once, so how they were initialised does not matter here
        init, made.init = made.init, "copy"
        model = cls(made, backbone, side_dtype=side_dtype)
        model.config.init = made.init = init
        if expected is not None and model.fingerprint != expected:
            raise CheckpointError(
                f"{folder} was trained on backbone {expected} ({made.backbone_name_or_path}), the backbone given is "
                f"{model.fingerprint}; pass the backbone that it names"
            )
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

# whoever knows one of our models knows them all: the Auto classes then load any of their checkpoints
import longmem.modeling.memtrm  # noqa: E402
import longmem.modeling.training_free  # noqa: E402, F401
