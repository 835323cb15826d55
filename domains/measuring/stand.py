"""The test stand for timing: device, threads, images and models set up, and all put back after."""

import copy
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch._dynamo  # its limit on recompilations is raised for models of one class
from torch import Tensor, nn

from depgraph import DepgraphError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def find_device(name: str) -> torch.device:
    """Return the device with its index, or raise a DepgraphError if it is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise DepgraphError(f"unknown device '{name}'; choose cpu, cuda or cuda:N") from err
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise DepgraphError(f"no timing on device '{name}'; choose cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        found = f"{count} CUDA devices found" if count else "no CUDA device found"
        raise DepgraphError(f"device '{name}' is not there ({found}); choose another, or cpu")
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """Return the name the maker gave the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Let torch use `number` threads, None: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def room_to_compile(count: int) -> Iterator[None]:
    """Let torch.compile compile `count` more models, and raise rather than run one uncompiled."""
    # Models of one class share a cache; past its limit the rest would run eagerly, silently.
    limit = torch._dynamo.config.recompile_limit + count
    with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        yield


def random_images(
    shape: Sequence[int], device: torch.device, dtype: str, channels_last: bool, seed: int
) -> Tensor:
    """Return standard normal images of `shape`, batch included."""
    if channels_last and len(shape) != 4:
        raise DepgraphError(f"channels_last needs images of 3 dims, not of {len(shape) - 1}")
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    images = images.to(device, DTYPES[dtype])
    return images.to(memory_format=torch.channels_last) if channels_last else images


@contextmanager
def borrowed(
    name: str, model: nn.Module, device: torch.device, dtype: str, channels_last: bool
) -> Iterator[nn.Module]:
    """Give the model itself if it fits as it is, else a copy; in eval mode until the end."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise DepgraphError(f"model '{name}' is on the meta device; load its weights first")
    kind = DTYPES[dtype]
    fits = all(
        tensor.device == device and (tensor.dtype == kind or not tensor.is_floating_point())
        for tensor in tensors
    )
    if not fits or channels_last:
        model = copy.deepcopy(model).to(device, kind)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode
