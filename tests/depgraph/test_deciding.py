"""Whether code decides by sizes is told by what it asks of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depgraph._deciding import decisions_noted


def checked(x: Tensor) -> Any:
    if x.shape[1] != 3:
        raise ValueError(f"{x.shape[1]} channels")
    torch._assert(x.shape[2] == 4, "no")
    return x


LAYERS = nn.ModuleList([nn.ReLU(), nn.Tanh()])
DECIDING: dict[str, Callable[[Tensor], Any]] = {
    "a branch": lambda x: x if x.shape[0] > 1 else -x,
    "a number of a sum": lambda x: x if x.size(1) % 2 else -x,
    "elements": lambda x: x if x.numel() == 24 else -x,
    "the length": lambda x: x if len(x) == 2 else -x,
    "what is not zero": lambda x: x if x.shape[1] - 3 else -x,
    "a root": lambda x: x if math.sqrt(x.shape[2]) > 1 else -x,
    "a minimum": lambda x: x[: min(x.shape[0], 3)],
    "a table": lambda x: x if {7: 1}.get(x.shape[1]) else -x,
    "bits": lambda x: x if x.shape[1] >> 2 & 1 else -x,
    "a name": lambda x: getattr(x, f"dim{x.shape[1]}", x),
    "bytes": lambda x: x if x.nbytes == 96 else -x,
    "a stride": lambda x: x if x.stride(0) == 12 else -x,
    "memory in order": lambda x: x if x.mT.is_contiguous() else -x,
    "as often": lambda x: [x for _ in range(x.shape[1] - 3)],
    "a layer by its number": lambda x: LAYERS[x.shape[1] // 3](x),
    "equal shapes": lambda x: x if x.shape == x.mT.shape else -x,
}
OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "views": lambda x: x.view(x.shape[0], x.shape[1] * x.shape[2]).expand(x.shape[0], -1),
    "checks": checked,
    "torch's own code": lambda x: F.layer_norm(x, x.shape[1:]) + F.interpolate(x, x.shape[2]),
    "a mean": lambda x: x.sum(1) / x.shape[1] + torch.zeros(x.shape[2], device=x.device),
    "numbers of its own": lambda x: x if len([1, 2]) > 1 else -x,
}


@pytest.mark.parametrize("name", [*DECIDING, *OTHERS])
def test_a_decision_is_noted_and_nothing_else(name: str) -> None:
    x = torch.empty(2, 3, 4, device="meta")
    with decisions_noted() as found:
        {**DECIDING, **OTHERS}[name](x)
    assert found == [name in DECIDING]
    assert all(type(size) is int for size in (*x.shape, x.size(0), x.numel(), len(x)))
