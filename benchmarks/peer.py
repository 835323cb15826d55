"""Torch-Pruning, with the recipe of its own documentation, for tables beside ours."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

LIMIT_S = 60


def torch_pruning_half(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """Prune half of the channels of a model, by L2, with the head counts told.

    Parameters
    ----------
    model : nn.Module
        Changed.
    inputs : tuple of Tensor

    Returns
    -------
    dict
        ``"outcome"``: ``"runs"``, ``"forward fails"``, ``"raises"``, ``"too slow"`` or
        ``"not installed"``; ``"seconds"`` for building and pruning.
    """
    if not find_spec("torch_pruning"):
        return {"outcome": "not installed", "seconds": 0.0}
    start = time.perf_counter()
    try:
        with _time_limit():
            _prune(model.eval(), inputs)
    except TimeoutError:
        return {"outcome": "too slow", "seconds": float(LIMIT_S)}
    except Exception:  # noqa: BLE001  whatever a peer raises on a model it cannot prune
        return {"outcome": "raises", "seconds": time.perf_counter() - start}
    seconds = time.perf_counter() - start
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception:  # noqa: BLE001
        return {"outcome": "forward fails", "seconds": seconds}
    return {"outcome": "runs", "seconds": seconds}


def _prune(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    import torch_pruning as tp

    heads: dict[nn.Module, int] = {}
    module: Any
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if hasattr(module, "qkv") and hasattr(module, "num_heads"):
            heads[module.qkv] = module.num_heads
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    pruner = tp.pruner.BasePruner(
        model,
        inputs if len(inputs) > 1 else inputs[0],
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=False,
        pruning_ratio=0.5,
        ignored_layers=last,
        num_heads=heads,
        prune_num_heads=False,
        prune_head_dims=True,
    )
    pruner.step()
    for qkv, count in pruner.num_heads.items():
        attention: Any = next(m for m in model.modules() if getattr(m, "qkv", None) is qkv)
        attention.num_heads = count
        attention.head_dim = attention.qkv.out_features // (3 * count)
        attention.attn_dim = attention.qkv.out_features // 3


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
