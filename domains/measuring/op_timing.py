"""Times single ops at given sizes on a device, for a table that predicts whole models.

An op's weights are taken from a pool larger than the caches, as in a model, where each layer's come
from memory; its input was just written, and is where the last op left it.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depgraph import DepgraphError
from domains.measuring.stand import DTYPES, cpu_threads, find_device
from domains.running.progress import progress_bar

OpJob = tuple[str, str, tuple[int, ...]]
"""Kind of op, JSON of its other arguments, and its sizes; see `depgraph.costing.work.Work`."""

POOL_BYTES = 1 << 27
"""Weights that take turns together; more than the last cache of most processors."""

PASSES = 15
"""Times that each op is timed, in an order of its own each time."""

LONG, LONG_PASSES = 0.1, 3
"""Ops that take more seconds than this are timed that many times only."""

BURST = 2e-3
"""Seconds that ops shorter than this are repeated for at a time."""


def time_ops(
    jobs: Iterable[OpJob],
    *,
    device: str = "cpu",
    threads: int | None = None,
    dtype: str = "float32",
    passes: int = PASSES,
    progress: bool = True,
) -> dict[OpJob, float]:
    """Time ops.

    Parameters
    ----------
    jobs : iterable of OpJob
    device : str
        ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    threads : int or None
        CPU threads; None: as torch is set.
    dtype : str
        ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    passes : int
        Rounds over all jobs.
    progress : bool
        A bar on standard error.

    Returns
    -------
    dict of OpJob to float
        Milliseconds: the least over the passes, since what else the machine does only ever adds.

    Raises
    ------
    DepgraphError
        For a device that is not there, and an op that it cannot run.
    """
    wanted = list(dict.fromkeys(jobs))
    if passes < 1:
        raise DepgraphError(f"passes is {passes}; give at least 1")
    where, kind = find_device(device), DTYPES.get(dtype)
    if kind is None:
        raise DepgraphError(f"unknown dtype '{dtype}'; choose one of {', '.join(DTYPES)}")
    times: dict[OpJob, list[float]] = {job: [] for job in wanted}
    with ExitStack() as stack:
        stack.enter_context(cpu_threads(threads))
        stack.enter_context(torch.inference_mode())
        bar = stack.enter_context(progress_bar(progress))
        task = bar.add_task("measuring ops", total=passes * len(wanted))
        bench = _Bench(where, kind)
        for number in range(passes):
            for job in random.Random(number).sample(wanted, len(wanted)):
                if number < LONG_PASSES or times[job][0] < LONG:
                    times[job].append(bench.seconds(job))
                bar.update(task, advance=1)
    return {job: min(own) * 1e3 for job, own in times.items()}


class _Bench:
    """Makes operands on the device, and times one op at a time."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        count = POOL_BYTES // dtype.itemsize
        self.pool = torch.randn(1 << 16, device=device).to(dtype).repeat(count >> 16)
        self._at = 0
        self._estimates: dict[OpJob, float] = {}

    def seconds(self, job: OpJob) -> float:
        """Mean seconds of the op over one burst."""
        try:
            run = _KINDS[job[0]](self, json.loads(job[1] or "{}"), job[2])
            if job not in self._estimates:
                run()  # what is set up at the first call
                self._estimates[job] = self._clock(run, 1)
            repeats = max(1, min(200, int(BURST / max(self._estimates[job], 1e-7))))
            return self._clock(run, repeats)
        except (RuntimeError, KeyError, TypeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise DepgraphError(
                f"{job[0]} of sizes {job[2]} does not run on {self.device} in {self.dtype}: "
                f"{reason}; choose another device, precision or batch size"
            ) from error

    def _clock(self, run: Callable[[], object], repeats: int) -> float:
        if self.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            first.record()
            for _ in itertools.repeat(None, repeats):
                run()
            last.record()
            torch.cuda.synchronize(self.device)
            return first.elapsed_time(last) / 1e3 / repeats
        start = time.perf_counter()
        for _ in itertools.repeat(None, repeats):
            run()
        return (time.perf_counter() - start) / repeats

    def new(self, *sizes: int) -> Tensor:
        """An input, whose own memory was just written."""
        return torch.empty(*sizes, device=self.device).uniform_(-1, 1).to(self.dtype)

    def weight(self, *sizes: int) -> Tensor:
        """Numbers that were not touched for a while."""
        count = int(np.prod(sizes))
        if count > len(self.pool):
            return self.new(*sizes)
        if self._at + count > len(self.pool):
            self._at = 0
        found = self.pool[self._at : self._at + count].view(*sizes)
        self._at += -(-count // 64) * 64
        return found


Fixed = dict
"""What of the arguments is no size."""


def _linear(bench: _Bench, fixed: Fixed, sizes: Sequence[int]) -> Callable[[], object]:
    rows, inner, out = sizes
    x, bias = bench.new(rows, inner), bench.new(out)
    return lambda: F.linear(x, bench.weight(out, inner), bias)


def _matmul(bench: _Bench, fixed: Fixed, sizes: Sequence[int]) -> Callable[[], object]:
    batch, rows, inner, columns = sizes
    left, right = bench.new(batch, rows, inner), bench.new(batch, inner, columns)
    return lambda: torch.matmul(left, right)


def _attention(bench: _Bench, fixed: Fixed, sizes: Sequence[int]) -> Callable[[], object]:
    batch, heads, queries, keys, dims = sizes[:5]
    value_dims = dims if fixed["alike"] else sizes[5]
    # heads lie beside each other within a token, as projections leave them
    q = bench.new(batch, queries, heads, dims).transpose(1, 2)
    k = bench.new(batch, keys, heads, dims).transpose(1, 2)
    v = bench.new(batch, keys, heads, value_dims).transpose(1, 2)
    mask = bench.new(1, heads, queries, keys) if fixed["masked"] else None
    causal = fixed["causal"]
    return lambda: F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


def _conv(bench: _Bench, fixed: Fixed, sizes: Sequence[int]) -> Callable[[], object]:
    batch, groups, inner, out, *extents = sizes
    x = bench.new(batch, groups * inner, *extents)
    bias = bench.new(groups * out)
    conv: Callable[..., Tensor] = getattr(F, f"conv{len(extents)}d")
    shape = (groups * out, inner, *fixed["kernel"])
    how = [fixed[name] for name in ("stride", "padding", "dilation")]
    return lambda: conv(x, bench.weight(*shape), bias, *how, groups)


def _rows(bench: _Bench, fixed: Fixed, sizes: Sequence[int]) -> Callable[[], object]:
    rows, width = sizes
    namespace, name, overload = fixed["op"].split(".")
    op = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    made = {"all": bench.new(rows, width), "column": bench.new(width), "one": bench.new(1)}

    def operand(value: object) -> object:
        if value == ["width"]:
            return [width]
        return made.get(value, value) if isinstance(value, str) else value

    args = [operand(value) for value in fixed["args"]]
    kwargs = {key: operand(value) for key, value in fixed["kwargs"].items()}
    return lambda: op(*args, **kwargs)


def _gather(bench: _Bench, fixed: Fixed, sizes: Sequence[int]) -> Callable[[], object]:
    rows, width = sizes
    table = bench.new(rows, width)
    places = torch.randint(rows, (rows,), device=bench.device)
    return lambda: table[places]


def _copy(bench: _Bench, fixed: Fixed, sizes: Sequence[int]) -> Callable[[], object]:
    # read across, as most copies in a model come from a transposition
    (count,) = sizes
    rows = max(2, min(64, count // 64))
    x = bench.new(rows, -(-count // rows), 1).transpose(0, 1)
    return lambda: x.contiguous()


def _call(bench: _Bench, fixed: Fixed, sizes: Sequence[int]) -> Callable[[], object]:
    x = bench.new(2, 2)
    return lambda: x.view(4)


def _module(bench: _Bench, fixed: Fixed, sizes: Sequence[int]) -> Callable[[], object]:
    x, module = bench.new(1), nn.Identity()
    return lambda: module(x)


_KINDS: dict[str, Callable[[_Bench, Fixed, Sequence[int]], Callable[[], object]]] = {
    "linear": _linear,
    "matmul": _matmul,
    "attention": _attention,
    "conv": _conv,
    "rows": _rows,
    "gather": _gather,
    "copy": _copy,
    "call": _call,
    "module": _module,
}
