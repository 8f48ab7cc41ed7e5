"""FSDP2: weights, gradients and optimiser states divided among processes, layer by layer.

Every backbone layer and every SideNet layer is a unit: gathered when it runs, let go afterwards. Frozen units keep the
backbone's dtype and are never reduced. Trained ones keep float32 weights, are gathered in the dtype that they compute
in, and are reduced in float32. accelerate's own wrapping gives all units one dtype and reduces them all, which is why
it is not used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, gather_object
from torch import Tensor, nn

from longmem.errors import ConfigError
from longmem.modeling.families import Family
from longmem.modeling.fingerprint import sketch_of


def wants_sharding(parallel: str) -> bool:
    """Whether to divide the model: the recipe says so, or says ``auto`` and the launch file does."""
    launched, version = _is_set("ACCELERATE_USE_FSDP"), os.environ.get("FSDP_VERSION", "1")
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if _is_set(f"ACCELERATE_USE_{name}"):
            raise ConfigError(
                f"launched for {name}; longmem trains with DDP or FSDP2, choose one in `accelerate config`"
            )
    if launched and version != "2":
        raise ConfigError(f"launched for FSDP{version}; longmem needs FSDP2: fsdp_version: 2 in the launch file")
    if launched and parallel == "ddp":
        raise ConfigError("optim.parallel is 'ddp', but launched for FSDP2; set optim.parallel = 'auto'")
    return parallel == "fsdp" or (parallel == "auto" and launched)


def shard(model: nn.Module, compute_dtype: torch.dtype | None = None) -> None:
    """Divide a ``LongMem``, or a causal language model that is trained itself, among the processes, in place.

    Build the optimiser afterwards: every parameter is another object then. The model is on the CPU, equal in all
    processes. Trained layers are gathered in ``compute_dtype``; None is their own.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    state = PartialState()
    _check_equal(model)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)  # reads the launch file's settings
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    whole: dict[str, Any] = {"mesh": mesh, "offload_policy": plugin.cpu_offload}
    layerwise = {**whole, "reshard_after_forward": bool(plugin.reshard_after_forward)}
    # inputs keep their dtype: under autocast the residual stream is float32, and so it must reach every layer
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    trained = {**layerwise, "mp_policy": policy}
    root: Any = model
    side = getattr(root, "sidenet", None)
    if side is None:
        for layer in Family.of(root).layers:
            fully_shard(layer, **trained)
    else:
        # one process alone saves the model, and could not gather what the others hold
        root.config.backbone_sketch = sketch_of(root.backbone.model)
        for layer in Family.of(root.backbone.model).layers:
            fully_shard(layer, **layerwise)
        for layer in side.layers:
            fully_shard(layer, **trained)
        # the gate is read again where a layer is recomputed, the final norm after the SideNet's forward
        fully_shard(side, **whole, reshard_after_forward=False)
        # a run that ends early would leave later units waiting for their turn
        root.backbone.stops_early = False
        root.backbone.rebuild()
    # with what is left: embeddings and head, which may be tied, gathered for the whole of a step
    fully_shard(root, **whole)


def let_go(model: nn.Module) -> None:
    """Divide again what a forward without backward left gathered; nothing, where the model is not divided."""
    from torch.distributed.fsdp import FSDPModule

    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensors: Iterable[tuple[str, Tensor]], keep: bool = True) -> dict[str, Tensor]:
    """The tensors undivided and on the CPU. All processes call this; those that do not ``keep`` get an empty dict."""
    gathered = ((name, undivided(tensor.detach())) for name, tensor in tensors)
    return {name: tensor.cpu() for name, tensor in gathered if keep}


@torch.no_grad()
def assign(parameters: Iterable[tuple[str, nn.Parameter]], values: Mapping[str, Tensor]) -> None:
    """Give the parameters, divided or not, the undivided ``values`` of their names.

    Raises:
        KeyError, RuntimeError: a value is missing or has another shape.
    """
    for name, parameter in parameters:
        parameter.copy_(_like(parameter, values[name]))


def undivided(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on the device that it is gathered on; all processes call this."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    divided: Any = tensor
    # where parameters wait on the CPU, they are gathered over the devices all the same
    gathered: Tensor = divided.to(divided.device_mesh.device_type).full_tensor()
    return gathered


def optimiser_part(optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """This process's part of an optimiser's state."""
    whole_state = optimiser.state_dict()
    local = {
        index: {name: value.to_local() if hasattr(value, "to_local") else value for name, value in each.items()}
        for index, each in whole_state["state"].items()
    }
    return {**whole_state, "state": local}


def load_optimiser_part(optimiser: torch.optim.Optimizer, part: Mapping[str, Any]) -> None:
    """The inverse of ``optimiser_part``, in as many processes."""
    from torch.distributed.tensor import DTensor

    parameters: list[Any] = [parameter for group in optimiser.param_groups for parameter in group["params"]]

    def divided(value: Any, like: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or not isinstance(like, DTensor):
            return value
        value = value.to(like.to_local().device)
        return DTensor.from_local(value, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())

    state = {i: {n: divided(v, parameters[i]) for n, v in each.items()} for i, each in part["state"].items()}
    optimiser.load_state_dict({**part, "state": state})


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """An undivided value, divided as the parameter is."""
    value = value.to(parameter.device, parameter.dtype)
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    divided: Any = parameter
    # every process has all of it: each takes its own part, nothing is sent
    return distribute_tensor(value, divided.device_mesh, divided.placements, src_data_rank=None)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _check_equal(model: nn.Module) -> None:
    """Processes that loaded nothing, or drew other weights, would each divide their own."""
    sample = [p.detach().flatten()[:: max(1, p.numel() // 64)][:64].double() for p in model.parameters()]
    sums = "none" if any(part.is_meta for part in sample) else " ".join(f"{float(part.sum()):.6e}" for part in sample)
    everywhere = gather_object([sums])
    other = next((rank for rank, theirs in enumerate(everywhere) if theirs != everywhere[0]), None)
    if other is not None or sums == "none":
        raise ConfigError(
            f"process {other or 0} has other weights than process 0 read, they cannot be divided; load them in every "
            "process (fsdp_cpu_ram_efficient_loading: false in the launch file), with the same seed"
        )
