"""FSDP2: weights, gradients and optimiser states divided among processes, layer by layer.

Every backbone layer and every SideNet layer is a unit of its own: it is gathered when it runs and let go afterwards.
Frozen units keep the backbone's dtype and are never reduced; trained ones keep float32 master weights, are gathered in
the dtype they compute in, and are reduced in float32. A unit of its own are also the SideNet's final norm, which runs
inside of the backbone, and its gate.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, gather_object
from torch import Tensor, nn

from longmem.errors import ConfigError
from longmem.modeling.families import Family

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def wants_sharding(parallel: str, accelerator: Accelerator) -> bool:
    """Whether to divide the model: the recipe says so, or says ``auto`` and the launch file does.

    Args:
        parallel: ``auto``, ``ddp`` or ``fsdp``.
        accelerator: of this run.

    Raises:
        ConfigError: it was launched for DeepSpeed, Megatron or FSDP1, which know nothing of a model inside of another.
    """
    kind = accelerator.distributed_type.value
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    version = os.environ.get("FSDP_VERSION", "1")
    if kind in ("DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise ConfigError(f"launched for {kind}; longmem trains with DDP or FSDP2, choose one in `accelerate config`")
    if launched and version != "2":
        raise ConfigError(f"launched for FSDP{version}; longmem needs FSDP2: fsdp_version: 2 in the launch file")
    if launched and parallel == "ddp":
        raise ConfigError("optim.parallel is 'ddp', but launched for FSDP2; set optim.parallel = 'auto'")
    return accelerator.num_processes > 1 and (parallel == "fsdp" or (parallel == "auto" and launched))


def shard(model: nn.Module, accelerator: Accelerator, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """Divide a ``LongMem``, or a causal language model that is trained itself (a ``MemTRM`` too), among the processes.

    It happens in place.

    Build the optimiser afterwards: every parameter is another object then.

    Args:
        model: equal in all processes.
        accelerator: its launch file may set ``reshard_after_forward`` and ``offload_params``.
        compute_dtype: what trained layers are gathered in; None is their own.

    Returns:
        the model.

    Raises:
        ConfigError: the processes hold different weights.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    _check_equal(model, accelerator)
    plugin = _plugin(accelerator)
    options: dict[str, Any] = {"mesh": _mesh(accelerator), "offload_policy": plugin.cpu_offload}
    layerwise = {**options, "reshard_after_forward": bool(plugin.reshard_after_forward)}
    # inputs stay as they are: under autocast the residual stream is float32, and so it must reach every layer
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    trained = {**layerwise, "mp_policy": policy}
    root: Any = model
    side = getattr(root, "sidenet", None)
    if side is None and hasattr(root, "backbone"):
        raise ConfigError(
            f"a {type(root).__name__} trains the layers that write its memory, which FSDP2 cannot divide here; "
            "set optim.parallel = 'ddp', and launch without FSDP"
        )
    if side is None:
        memtrm = getattr(root, "backbone", None)
        for layer in Family.of(root if memtrm is None else memtrm.model).layers:
            fully_shard(layer, **trained)
        if memtrm is not None:
            memtrm.stops_early = False
    else:
        language_model = root.backbone.model
        for layer in Family.of(language_model).layers:
            fully_shard(layer, **layerwise)
        for layer in side.layers:
            fully_shard(layer, **trained)
        if side.final_norm is not None:
            fully_shard(side.final_norm, **options)
        # the gate is read again where a layer is recomputed
        fully_shard(side, **options, reshard_after_forward=False)
        fully_shard(language_model, **layerwise)
        root.backbone.stops_early = False
    fully_shard(root, **options)
    return model


def let_go(model: nn.Module) -> None:
    """Divide again what a forward without backward has left gathered; nothing, where the model is not divided."""
    from torch.distributed.fsdp import FSDPModule

    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """The tensors undivided and on the CPU. All processes call this; those that do not ``keep`` get an empty dict."""
    found = {}
    for name, tensor in tensors.items():
        gathered = undivided(tensor.detach())
        if keep:
            found[name] = gathered.cpu()
    return found


def assign(parameters: Iterable[tuple[str, nn.Parameter]], values: Mapping[str, Tensor]) -> None:
    """Give the parameters, divided or not, the undivided ``values`` of their names."""
    with torch.no_grad():
        for name, parameter in parameters:
            if name in values:
                parameter.copy_(like(parameter, values[name]))


def whole_state(optimiser: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """An optimiser's state with undivided tensors on the CPU; see ``whole``."""
    state = optimiser.state_dict()
    undivided = {
        index: {name: _kept(value, keep) for name, value in each.items()} for index, each in state["state"].items()
    }
    return {"state": undivided, "param_groups": state["param_groups"]}


def load_whole_state(optimiser: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """The inverse of ``whole_state``, for an optimiser over the same parameters, divided or not."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    places = [index for group in state["param_groups"] for index in group["params"]]
    of_index = dict(zip(places, parameters, strict=True))
    divided = {
        index: {
            name: like(of_index[index], value) if _fits(value, of_index[index]) else value
            for name, value in each.items()
        }
        for index, each in state["state"].items()
    }
    optimiser.load_state_dict({"state": divided, "param_groups": state["param_groups"]})


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """An undivided value, divided as the parameter is."""
    value = value.to(parameter.device, parameter.dtype)
    if not _divided(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    divided: Any = parameter
    # every process has all of it: each takes its own part, nothing is sent
    return distribute_tensor(value, divided.device_mesh, divided.placements, src_data_rank=None)


def undivided(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on the device that it is gathered on; all processes call this."""
    if not _divided(tensor):
        return tensor
    divided: Any = tensor
    # where parameters wait on the CPU, they are gathered over the devices all the same
    gathered: Tensor = divided.to(divided.device_mesh.device_type).full_tensor()
    return gathered


def _divided(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _kept(value: Any, keep: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    gathered = undivided(value)
    return gathered.cpu() if keep else None


def _fits(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0


def _plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin:
    """What the launch file says about FSDP2; its defaults where there is none."""
    launched = getattr(accelerator.state, "fsdp_plugin", None)
    return launched if launched is not None else FullyShardedDataParallelPlugin(fsdp_version=2)


def _mesh(accelerator: Accelerator) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = getattr(accelerator, "torch_device_mesh", None)
    if mesh is not None:
        names = tuple(accelerator.parallelism_config.fsdp_dim_names)
        chosen: DeviceMesh = mesh[names]
        return chosen
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def _check_equal(model: nn.Module, accelerator: Accelerator) -> None:
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
