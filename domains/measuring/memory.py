"""Memory of one forward pass, from torch's allocator of the device that it runs on.

What oneDNN takes for itself on the CPU does not pass through that allocator and is not counted.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def weights_bytes(model: nn.Module) -> int:
    """Bytes of the storages of parameters and buffers, a shared one counted once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def forward_peak_bytes(run: Callable[[Tensor], object], images: Tensor) -> int:
    """Most bytes that one forward pass has allocated at once, beyond what was there before."""
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
        before = torch.cuda.memory_allocated(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        run(images)
        torch.cuda.synchronize(images.device)
        return torch.cuda.max_memory_allocated(images.device) - before
    # The CPU allocator keeps no high-water mark, but the profiler hears each of its calls.
    with quiet_profiler(), tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            run(images)
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    calls = [event for event in events if event.get("name") == "[memory]"]
    calls.sort(key=lambda event: event["ts"])
    sizes = [event["args"]["Bytes"] for event in calls]  # negative where memory is freed
    return int(np.cumsum([0, *sizes]).max())


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Let torch's profiler run without its notes."""
    # Its C++ side writes notes to standard error, among them an ERROR where there is no GPU.
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
