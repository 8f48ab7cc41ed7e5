"""What a recipe trains: the model, its division among processes, its optimiser."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longmem.data.tokens import TokenCorpus
from longmem.errors import ConfigError
from longmem.evaluation.layers import best_layers
from longmem.modeling.alibi_gpt import AlibiGPTConfig, AlibiGPTForCausalLM
from longmem.modeling.baselines import MemTRM
from longmem.modeling.checkpoints import CHANGEABLE
from longmem.modeling.families import Family
from longmem.modeling.loading import load_backbone, named_dtype
from longmem.modeling.longmem import LongMem
from longmem.modeling.weights import quantization, sketch_of
from longmem.training.recipe import OptimSection, Recipe

AUTO_DOCUMENTS, AUTO_TOKENS = 4, 4096  # of text on which memory_layers = "auto" measures

# the model


def build_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: torch.device, texts: TokenCorpus, *, quiet: bool = False
) -> PreTrainedModel:
    """The model, its trained weights in float32, where it was loaded."""
    model: Any
    if recipe.task == "pretrain":
        model = trained = _causal(recipe, tokenizer)
    else:
        settings = recipe.model_settings | {"revision": recipe.backbone.revision}
        if recipe.sidenet.memory_layers == "auto":
            settings["memory_layers"] = lambda loaded: _measured(loaded, recipe, tokenizer, device, texts, quiet)
        if recipe.method == "memtrm":
            dtype = named_dtype(recipe.backbone.dtype or "float32")
            model = MemTRM.from_backbone(str(recipe.backbone.path), dtype=dtype, **settings)
            trained = model.backbone.model
        else:
            model = _longmem(recipe, device, settings)
            trained = model.sidenet
        half = model.backbone.model.dtype == torch.float16
        if half and device.type == "cpu" and runs_bf16(recipe.optim.precision, device):
            raise ConfigError(
                "a backbone in float16 and optim.precision 'bf16' do not go together on a CPU: "
                "set backbone.dtype = 'bfloat16', or optim.precision = 'fp32'"
            )
    set_dropout(trained, recipe.optim.dropout)
    if recipe.optim.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if recipe.optim.parallel == "fsdp" and PartialState().num_processes > 1:
        shard(model, torch.bfloat16 if runs_bf16(recipe.optim.precision, device) else None)
    return model  # type: ignore[no-any-return]


def backbone_shape(recipe: Recipe, vocab_size: int | None = None, **settings: Any) -> AlibiGPTConfig:
    """Configuration of the backbone that ``[model]`` describes; ``vocab_size`` is that of the tokenizer."""
    shape = recipe.model
    return AlibiGPTConfig(
        vocab_size=shape.vocab_size or vocab_size or recipe.data.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=recipe.data.window,
        **settings,
    )


def set_dropout(module: nn.Module, probability: float) -> None:
    """Give every dropout below ``module`` this probability, those written as a plain number included."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = probability
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, probability)


def runs_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16; ``auto`` does where the hardware multiplies in it.

    A CPU without such instructions emulates them: at width 256 a step then takes fifteen times longer than in fp32.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    multiplies = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512" and multiplies


def half_or_single(recipe: Recipe, device: torch.device) -> torch.dtype:
    """What a recipe leaves open: bfloat16 where a GPU computes in it, else float32."""
    return torch.bfloat16 if device.type != "cpu" and runs_bf16(recipe.optim.precision, device) else torch.float32


def _causal(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Fresh weights drawn from the global generator."""
    shape = recipe.model
    if shape.vocab_size is not None and shape.vocab_size < len(tokenizer):
        raise ConfigError(f"model.vocab_size ({shape.vocab_size}) must be at least the tokenizer's ({len(tokenizer)})")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return AlibiGPTForCausalLM(backbone_shape(recipe, len(tokenizer), dropout=recipe.optim.dropout, **special))


def _measured(
    backbone: PreTrainedModel,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    texts: TokenCorpus,
    quiet: bool,
) -> tuple[int, ...] | None:
    """The layers whose memory is worth most, measured on the longest documents, once: the run's folder keeps what was
    found, also for a run that goes on."""
    side, named = recipe.sidenet, recipe.backbone
    longest = np.argsort(-np.diff(texts.bounds), kind="stable")[:AUTO_DOCUMENTS]
    with PartialState().main_process_first():
        return best_layers(
            backbone,
            [torch.from_numpy(texts.document(int(number))[:AUTO_TOKENS]) for number in longest],
            tokenizer,
            kept=recipe.out_dir / "layers.json",
            device=None if named.quantised or named.device_map else device,
            stride=side.stride if recipe.method == "longmem" else None,
            chunk_size=side.chunk_size,
            num_retrieved=side.num_retrieved,
            quiet=quiet,
        )


def _longmem(recipe: Recipe, device: torch.device, settings: dict[str, Any]) -> LongMem:
    side, named, half = recipe.sidenet, recipe.backbone, half_or_single(recipe, device)
    dtype = half if named.dtype is None else named_dtype(named.dtype)
    loading: dict[str, Any] = {} if named.device_map is None else {"device_map": named.device_map}
    if named.quantised is not None:
        loading = {"device_map": {"": device}, **loading, "quantization_config": quantization(named.quantised, half)}
    path = str(named.path)
    if side.start is not None:
        # trained before: how much it retrieves, and from how much, may be another number
        own = {name: value for name, value in settings.items() if name in CHANGEABLE}
        # as it is stored, which its fingerprint is of
        backbone = load_backbone(path, named.revision, dtype if loading else None, **loading)
        model = LongMem.from_pretrained(side.start, backbone=backbone, side_dtype=torch.float32, **own)
        if not loading:
            nn.Module.to(backbone, dtype)
        model.config.backbone_name_or_path = os.path.abspath(path) if os.path.exists(path) else path
        model.config.backbone_revision = named.revision or model.config.backbone_revision
        return model
    model = LongMem.from_backbone(path, dtype=dtype, side_dtype=torch.float32, **loading, **settings)
    biases = [gate.bias for gate in model.sidenet.gates] if model.sidenet.gates else [model.sidenet.memory_gate]
    for bias in biases:
        nn.init.constant_(bias, math.log(side.gate / (1 - side.gate)))  # type: ignore[arg-type]
    return model


# its division among processes


def shard(model: nn.Module, compute_dtype: torch.dtype | None = None) -> None:
    """FSDP2: divide a ``LongMem``, or a causal language model that is trained itself, among the processes, in place.

    Every layer is a unit: gathered when it runs, let go afterwards. Frozen units keep the backbone's dtype and are
    never reduced. Trained ones keep float32 weights, are gathered in ``compute_dtype`` (None is their own), and are
    reduced in float32. accelerate's own wrapping gives all units one dtype and reduces them all.

    Build the optimiser afterwards: every parameter is another object then. The model is equal in all processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    state = PartialState()
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    # inputs keep their dtype: under autocast the residual stream is float32, and so it must reach every layer
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    root: Any = model
    side = getattr(root, "sidenet", None)
    for layer in Family.of(root).layers if side is None else side.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if side is not None:
        # one process alone saves the model, and could not gather what the others hold
        root.config.backbone_sketch = sketch_of(root.backbone.model)
        for layer in Family.of(root.backbone.model).layers:
            fully_shard(layer, mesh=mesh)
        # the gate is read again where a layer is recomputed, the final norm after the SideNet's forward
        fully_shard(side, mesh=mesh, reshard_after_forward=False)
        # a run that ends early would leave later units waiting for their turn
        root.backbone.stops_early = False
        root.backbone.rebuild()
    # with what is left: embeddings and head, which may be tied, gathered for the whole of a step
    fully_shard(root, mesh=mesh)


def undivided(tensor: Any) -> Any:
    """The whole of a tensor; all processes call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# its optimiser


def lr_share(optim: OptimSection, done: float) -> float:
    """Share of the peak rate after ``done`` (0 to 1) of the run."""
    if done < optim.warmup:
        return done / optim.warmup
    left = min(1.0, max(0.0, (1 - done) / max(1 - optim.warmup, 1e-9)))
    if optim.schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    if optim.schedule == "wsd":
        return 1.0 if optim.decay_fraction == 0 else min(1.0, max(0.0, 1 - done) / optim.decay_fraction)
    return 1.0 if optim.schedule == "constant" else left


class AdamWAndMuon(torch.optim.AdamW):
    """AdamW, and Muon (Jordan et al. 2024) for the groups that say ``muon``, as one optimiser with one state."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        everything = self.param_groups
        try:
            self.param_groups = [group for group in everything if not group["muon"]]
            super().step()
        finally:
            self.param_groups = everything
        for group in everything:
            if group["muon"]:
                self._muon(group)

    def _muon(self, group: dict[str, Any]) -> None:
        muon = torch.optim.Muon(group["params"], lr=group["lr"], weight_decay=group["weight_decay"])
        for weight in group["params"]:
            # AdamW looks for a step in every state that it loads
            self.state[weight].setdefault("step", torch.zeros(()))
            muon.state[weight] = self.state[weight]  # the same dict: what it remembers is kept here
        muon.step()


def is_gate(name: str) -> bool:
    """Whether a parameter decides how much of memory is read."""
    return "memory_gate" in name or ".gates." in name


def build_optimiser(named: Iterable[tuple[str, nn.Parameter]], optim: OptimSection) -> torch.optim.Optimizer:
    """Matrices inside the layers go to Muon where it is asked for, all else to AdamW. Only matrices decay."""
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, weight in named:
        gate, matrix = is_gate(name), weight.ndim >= 2
        # a name with a number in it is of a layer, and no embedding or head
        muon = optim.optimiser == "muon" and weight.ndim == 2 and not gate and any(p.isdigit() for p in name.split("."))
        rate = optim.muon_lr if muon else optim.gate_lr or optim.lr if gate else optim.lr
        groups.setdefault((muon, rate, optim.weight_decay if matrix and not gate else 0.0), []).append(weight)
    # the first group's rate is the one that is logged
    ordered = sorted(groups.items(), key=lambda group: group[0][:2] != (False, optim.lr))
    return AdamWAndMuon(
        [{"params": some, "muon": muon, "lr": rate, "weight_decay": decay} for (muon, rate, decay), some in ordered],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
    )
