"""Where and how a model runs: accelerate's device and precision, and the model put back after."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    parse_flag_from_env,
    patch_environment,
)
from torch import Tensor, nn

from depgraph import DepgraphError
from domains.running.sharding import fsdp_plugin


def accelerator(device: str | None, amp: bool) -> Accelerator:
    """Return an accelerator for `device` (None: CUDA where there is one, else the CPU).

    Raises
    ------
    DepgraphError
        The device is not on this machine, or the processes were launched to share in a way that is
        not supported.
    """
    try:
        wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise DepgraphError(f"device '{device}' is not known; use 'cpu' or 'cuda'") from error
    if wanted.type == "cuda":
        # Launched as several processes, each has a device of its own.
        own = int(os.environ.get("LOCAL_RANK", "0")) if wanted.index is None else wanted.index
        if not torch.cuda.is_available() or own >= torch.cuda.device_count():
            raise DepgraphError(f"device '{device}' is not on this machine; use 'cpu'")
        torch.cuda.set_device(own)
    elif wanted.type != "cpu":
        raise DepgraphError(f"device '{device}' is not supported; use 'cpu' or 'cuda'")
    half = wanted.type == "cuda" and not torch.cuda.is_bf16_supported()
    precision = ("fp16" if half else "bf16") if amp else "no"
    # accelerate keeps one state per process and refuses another device or precision later on, but
    # one process of ours trains, evaluates and compares under several.
    AcceleratorState._reset_state(reset_partial_state=True)
    patient = InitProcessGroupKwargs(timeout=_PATIENCE)
    # On the CPU accelerate would take FSDP for DDP without a word; `_sharding` does it on both.
    with patch_environment(ACCELERATE_USE_FSDP="false"):
        run = Accelerator(
            cpu=wanted.type == "cpu", mixed_precision=precision, kwargs_handlers=[patient]
        )
    if run.num_processes == 1 and _asked_for_more():
        raise DepgraphError(
            "`accelerate launch` starts one process only on the CPU, whatever --num_processes is; "
            "use `torchrun --nproc_per_node N`"
        )
    if run.distributed_type not in _DISTRIBUTED:
        raise DepgraphError(
            f"training shared as {run.distributed_type.value} is not supported; use `accelerate "
            "launch --multi_gpu` or `--use_fsdp --fsdp_version 2` or, on the CPU, torchrun"
        )
    fsdp_plugin(run)  # refuses what it cannot follow, before there is anything to lose
    return run


def _asked_for_more() -> bool:
    """Whether ``accelerate launch --cpu`` got --num_processes above 1: all that shows of it."""
    by_accelerate = parse_flag_from_env("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ
    return by_accelerate and "WORLD_SIZE" not in os.environ


_PATIENCE = timedelta(days=7)
"""How long processes wait for the main one, which prunes and times alone."""

_DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def loader_workers(device: torch.device, num_workers: int | None) -> int:
    """Return the number of loader processes: as asked, else none on the CPU, up to 8 on CUDA."""
    if num_workers is not None:
        return num_workers
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def shard_of(device: Accelerator, size: int | None = None) -> tuple[int, int]:
    """Return the number of this process, and how many share the work.

    Of fewer samples than there are processes each takes all: the shares that are right stay so.
    """
    if size is not None and size < device.num_processes:
        return 0, 1
    return device.process_index, device.num_processes


def gathered(device: Accelerator, local: Tensor) -> Tensor:
    """Return what all processes hold, side by side; the same length everywhere.

    Gradients reach this process's part alone, but as many times over as there are processes: the
    mean over processes, which is taken of the parameters' gradients, is then that of one process
    with the whole batch.
    """
    count = device.num_processes
    if count == 1:
        return local
    parts = list(device.gather(local.detach()).chunk(count))
    if local.requires_grad:
        parts[device.process_index] = local + (count - 1) * (local - local.detach())
    return torch.cat(parts)


def mean_over(device: Accelerator, value: Tensor) -> Tensor:
    """Return the mean of a value over all processes."""
    return value if device.num_processes == 1 else device.reduce(value, "mean")


def mean_gradients(device: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Make the gradients of parameters that are not in a wrapped model the same everywhere."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = mean_over(device, parameter.grad)


@contextmanager
def borrowed(model: nn.Module, device: torch.device, train: bool) -> Iterator[nn.Module]:
    """Move the model and set its mode; on leaving, put back its device and each module's mode."""
    modes = [(module, module.training) for module in model.modules()]
    home = next((tensor.device for tensor in model.parameters()), device)
    model.to(device).train(train)
    try:
        yield model
    finally:
        model.to(home)
        for module, training in modes:
            module.training = training


def all_logits(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the logits of each head: distilled models give a tuple in train mode."""
    return output if isinstance(output, tuple) else (output,)


def mean_logits(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return one prediction (batch, classes), the mean of the heads."""
    return torch.stack(all_logits(output)).mean(0)
