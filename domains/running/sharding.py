"""Weights, gradients and optimiser state in parts over several processes: torch's FSDP 2.

accelerate's launcher says whether, and in which units. accelerate itself would do it on GPUs and
leave it out on the CPU; done here, it is the same on both.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from depgraph import DepgraphError

# Tested on shards; others were seen to fail there, or to wait for each other for ever.
OPTIMIZERS = ("adamw", "adam", "nadamw", "radam", "adan", "lamb", "lars", "sgd", "momentum")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # gone through, not always called


def fsdp_plugin(device: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """How the processes share the weights, by how they were launched; None: each holds them all.

    Raises
    ------
    DepgraphError
        FSDP 1, or an option of accelerate's FSDP that would not be followed.
    """
    if device.num_processes == 1 or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise DepgraphError("FSDP 1 is not supported; launch with --fsdp_version 2")
    try:
        # All processes load the whole model: transformers is not to leave that to the main one.
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    except ValueError as error:
        raise DepgraphError(f"accelerate does not take these options of FSDP: {error}") from error
    refused = {
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
        "fsdp_ignored_modules": plugin.ignored_modules is not None,
        "use_parallelism_config": parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"),
    }
    for name, asked in refused.items():
        if asked:
            raise DepgraphError(f"accelerate's {name} is not supported; launch without it")
    return plugin


def check_shardable(model: nn.Module, optimizer: str, device: Accelerator) -> None:
    """Raise where training with FSDP would fail or not be that of one process."""
    if optimizer not in OPTIMIZERS:
        raise DepgraphError(
            f"optimizer '{optimizer}' does not work on weights in shards (FSDP); use one of "
            f"{', '.join(OPTIMIZERS)}"
        )
    if device.mixed_precision == "fp16":
        raise DepgraphError(
            "FSDP with mixed precision needs bfloat16, which this GPU has not; train without amp"
        )
    kinds = sorted({str(parameter.dtype) for parameter in model.parameters()})
    if len(kinds) > 1:
        raise DepgraphError(
            f"FSDP needs parameters of one dtype, and the model's are {' and '.join(kinds)}; "
            "convert them to one"
        )


def shard(model: nn.Module, device: Accelerator) -> nn.Module:
    """Return a copy of which each process holds its part of every parameter, in the same names.

    Raises
    ------
    DepgraphError
        Not launched with FSDP, or a model that cannot be sharded so (scalar parameters; tied ones
        where there are units).
    """
    plugin = fsdp_plugin(device)
    if plugin is None:
        raise DepgraphError("launch with accelerate's --use_fsdp to share weights")
    mesh = init_device_mesh(device.device.type, (device.num_processes,))
    model = copy.deepcopy(model)
    try:
        plugin.set_auto_wrap_policy(model)
        is_unit = fsdp2_prepare_auto_wrap_policy(plugin, model)
        parts = [m for m in list(model.modules())[1:] if not isinstance(m, _CONTAINERS)]
        units = [part for part in parts if is_unit is not None and is_unit(part)]
        if units:
            _refuse_tied(model)
        for module in reversed(units):  # what is within another comes first
            module.register_forward_hook(_no_view)
            fully_shard(module, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
        model.register_forward_hook(_no_view)
        fully_shard(model, mesh=mesh)
    except ValueError as error:
        raise DepgraphError(
            f"the model cannot be shared as FSDP: {error} (`accelerate launch --multi_gpu` gives "
            "each process the whole model)"
        ) from error
    return model


def _refuse_tied(model: nn.Module) -> None:
    """Raise for a parameter of two names: torch would untie it where they are in two units."""
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in first:
            raise DepgraphError(
                f"parameters '{first[parameter]}' and '{name}' are one, which FSDP would untie; "
                "launch with fsdp_auto_wrap_policy NO_WRAP"
            )
        first[parameter] = name


def _no_view(module: nn.Module, args: Any, output: Any) -> Any:
    """An output that may be changed in place: of a view, that would cost FSDP's hook on it."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) and x._is_view() else x, output)


@contextmanager
def whole_units() -> Iterator[None]:
    """Say what is wrong when a part of a model is read without the unit that gathers it."""
    try:
        yield
    except RuntimeError as error:
        if "mixed torch.Tensor and DTensor" not in str(error):
            raise
        raise DepgraphError(
            "the model reads the weights of a module without calling it, so that FSDP cannot make "
            "it a unit; launch with larger ones (fsdp_min_num_params, or whole blocks as "
            "fsdp_transformer_layer_cls_to_wrap)"
        ) from error


@torch.no_grad()
def broadcast(device: Accelerator, tensors: Iterable[Tensor]) -> None:
    """Overwrite plain tensors with those of the main process."""
    for tensor in tensors:
        sent = tensor.detach().to(device.device, copy=True).contiguous()
        distributed.broadcast(sent, src=0)
        tensor.copy_(sent)


def whole(tree: Any) -> Any:
    """Nested data with each shard gathered, on the CPU; all processes must call it."""
    return tree_map(_whole, tree)


def _whole(leaf: Any) -> Any:
    return leaf.full_tensor().detach().cpu() if isinstance(leaf, DTensor) else leaf


def placed_like(value: Tensor, pattern: Tensor) -> Tensor:
    """A tensor on the device of another, and in shards where that is."""
    value = value.to(pattern.device)
    if not isinstance(pattern, DTensor) or isinstance(value, DTensor):
        return value
    # Each process has the whole and takes its part: nothing is sent.
    return distribute_tensor(value, pattern.device_mesh, pattern.placements, src_data_rank=None)


def load_whole(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a whole state into a model that may be sharded."""
    options = StateDictOptions(full_state_dict=True, strict=True)
    set_model_state_dict(model, dict(state), options=options)


def load_whole_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Load an optimiser's whole state where its parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def placed(value: Any, parameter: Tensor) -> Any:
        alike = isinstance(value, Tensor) and value.shape == parameter.shape
        return placed_like(value, parameter) if alike else value

    values = {
        number: {name: placed(value, parameters[number]) for name, value in kept.items()}
        for number, kept in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": values})
