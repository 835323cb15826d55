"""Random numbers that depend on what is drawn, not on what was drawn before.

Every epoch and every drawn image gets a seed of its own, made from (seed, epoch, place). That is
why a checkpoint needs no generator states and why the number of loader processes is free.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed from `parts`, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int, devices: tuple[torch.device, ...] = ()) -> Iterator[None]:
    """Seed Python, numpy, torch on the CPU and CUDA `devices`; on leaving, put all states back.

    torchvision draws from torch's global generator, timm from Python's and numpy's too.
    """
    python, numpy_, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = [torch.cuda.get_rng_state(device) for device in devices]
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)
        torch.set_rng_state(cpu)
        for device, state in zip(devices, cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
