"""Several processes that share one run, as ``accelerate launch`` starts them: who writes when.

Training and evaluation shard their batches among them; whatever else there is, the main one does.
"""

from __future__ import annotations

import os

import torch
from torch import distributed

from domains.running.device import accelerator


def num_processes() -> int:
    """How many processes share this run; 1 where it was not launched as several."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes and reports."""
    return rank() == 0


def join(device: str | None = None) -> None:
    """Meet the other processes for the first time; at once where there are none.

    Parameters
    ----------
    device : str or None
        As in `FinetuneSettings`; decides how they talk.
    """
    if num_processes() > 1:
        accelerator(device, amp=False)


def wait() -> None:
    """Wait for the other processes, once they have been joined."""
    if distributed.is_available() and distributed.is_initialized():
        devices = [torch.cuda.current_device()] if distributed.get_backend() == "nccl" else None
        distributed.barrier(device_ids=devices)
