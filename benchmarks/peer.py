"""Torch-Pruning, with the recipe of its own documentation, for tables beside ours."""

from __future__ import annotations

import copy
import multiprocessing
import resource
import time
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from torch import Tensor, nn

import depgraph
from benchmarks.sources import Build

LIMIT_S, LIMIT_BYTES = 40, 6 << 30

RATIO_STEP = 1 / 256
"""How near to each other the ratios are between which the search ends."""


def torch_pruning_half(build: Build) -> dict[str, Any]:
    """Prune half of the channels of a model, by L2, with the head counts told.

    Parameters
    ----------
    build : callable
        Makes the model and its inputs.

    Returns
    -------
    dict
        ``"outcome"``: ``"runs"``, ``"forward fails"``, ``"raises"``, ``"no end"`` (more than
        `LIMIT_S` seconds or `LIMIT_BYTES`) or ``"not installed"``; ``"seconds"`` for building and
        pruning.

    Notes
    -----
    In a process of its own: its index lists have been seen to fill all memory.
    """
    if not find_spec("torch_pruning"):
        return {"outcome": "not installed", "seconds": 0.0}
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_try, args=(build, sender), daemon=True)
    child.start()
    sender.close()
    try:
        if receiver.poll(LIMIT_S):
            result: dict[str, Any] = receiver.recv()
            return result
    except EOFError:
        pass  # killed for memory
    finally:
        child.kill()
        child.join()
    return {"outcome": "no end", "seconds": float(LIMIT_S)}


def _try(build: Build, sender: Connection) -> None:
    taken = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (taken + LIMIT_BYTES, taken + LIMIT_BYTES))
    model, inputs = build()
    import_module("torch_pruning")  # which takes a while, and is no part of pruning
    start = time.perf_counter()
    try:
        _prune(model.eval(), inputs)
    except Exception as error:  # noqa: BLE001  whatever a peer raises on a model it cannot prune
        full = isinstance(error, MemoryError) or "allocate memory" in str(error)
        outcome = "no end" if full else "raises"
        sender.send({"outcome": outcome, "seconds": time.perf_counter() - start})
        return
    seconds = time.perf_counter() - start
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception:  # noqa: BLE001
        sender.send({"outcome": "forward fails", "seconds": seconds})
        return
    sender.send({"outcome": "runs", "seconds": seconds})


def torch_pruning_to(model: nn.Module, inputs: Tensor, macs: float) -> nn.Module:
    """Prune a copy of a model by L2, the same share everywhere, to a share of the MACs.

    Parameters
    ----------
    model : nn.Module
    inputs : Tensor
    macs : float
        Share kept; the copy has at most as many, by the finest step of the ratio that gives it.

    Returns
    -------
    nn.Module
    """
    dense = depgraph.count_macs(model, inputs)
    low, high = 0.0, 1.0
    best: nn.Module | None = None
    while best is None or high - low > RATIO_STEP:
        middle = (low + high) / 2
        small = copy.deepcopy(model).eval()
        _prune(small, (inputs,), middle)
        if depgraph.count_macs(small, inputs) <= macs * dense:
            best, high = small, middle
        else:
            low = middle
    return best


def _prune(model: nn.Module, inputs: tuple[Tensor, ...], ratio: float = 0.5) -> None:
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
        pruning_ratio=ratio,
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
