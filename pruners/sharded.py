"""Scores and slices a checkpoint under a cap on memory; what was done survives a crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from depgraph import DependencyGraph, DepgraphError, Plan, trace
from depgraph.checkpoint import PIECE_BYTES, Checkpoint
from depgraph.sharded import ShardedSlicer, stored_names
from pruners.allocation import allocate
from pruners.magnitude import Norm, Random, power_sums
from pruners.metrics import Metric, make_metric

PIECES_AT_ONCE = 4
"""A piece, its numbers in float32, what is cut of it, and the allocator's slack."""

Progress = Callable[[str, int, int], None]
"""Told the stage, and the bytes done and to be done of it."""


class MemoryCap:
    """Most memory that this process may take.

    Parameters
    ----------
    limit : int, optional
        Bytes of resident memory; none by default.

    Attributes
    ----------
    peak : int
        Most bytes that `check` has seen.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.peak = 0
        self._process = psutil.Process()

    def check(self, more: int = 0) -> None:
        """See what is taken now.

        Parameters
        ----------
        more : int
            Bytes that are about to be taken.

        Raises
        ------
        DepgraphError
            When that is too much; the sentence says what would do.
        """
        taken = self._process.memory_info().rss
        self.peak = max(self.peak, taken)
        if self.limit is not None and taken + more > self.limit:
            raise DepgraphError(
                f"memory is capped at {_mib(self.limit)}, but {_mib(taken)} are taken and "
                f"{_mib(more)} more are needed; allow at least {_mib(int(1.1 * (taken + more)))}"
            )


def _mib(count: int) -> str:
    return f"{-(-count // 2**20)} MiB"


def prune_checkpoint(
    model: nn.Module,
    example_inputs: Any,
    checkpoint: str | PathLike[str],
    out: str | PathLike[str],
    metric: str | Metric = "l2",
    ratio: float | None = None,
    *,
    target: Mapping[str, float] | None = None,
    scope: str = "global",
    kinds: Iterable[str] | None = None,
    ignore: Sequence[str] = (),
    round_to: int = 1,
    min_units: int = 1,
    normalise: str | None = None,
    per: str | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Prune a model whose weights are on disk, and may be larger than memory.

    Parameters
    ----------
    model : nn.Module
        Its structure: parameters and persistent buffers on the meta device, other buffers real
        (``accelerate.init_empty_weights(include_buffers=False)`` makes such a model).
    example_inputs : Tensor, tuple of Tensors, or mapping of str to Tensor
        See `depgraph.trace`.
    checkpoint : path
        Directory of safetensors, in shards or whole.
    out : path
        Directory that `depgraph.load` reads, with a shard for each shard. Half-done work is kept
        beside it, in ``.<name>.partial``.
    metric : str or Metric
        ``"l2"``, ``"l1"`` or ``"random"``.
    ratio, target, scope, kinds, ignore, round_to, min_units, normalise, per
        See `prune`.
    seed : int
        Of the random metric.
    max_memory : int, optional
        Bytes of resident memory that the process stays below.
    resume : bool
        Go on with what an earlier call with the same arguments began. Shards are the unit: one that
        was not finished is begun again.
    progress : callable, optional
        ``progress(stage, done, total)`` in bytes; stages are ``"score"`` and ``"slice"``.

    Returns
    -------
    Plan

    Raises
    ------
    DepgraphError
        When the checkpoint does not fit the model, the metric looks at data, memory does not
        suffice, or the work to resume was begun with other arguments.
    """
    if ratio is None and target is None:
        ratio = 0.5
    scorer = make_metric(metric, seed=seed)
    if not isinstance(scorer, (Norm, Random)):
        raise DepgraphError(
            f"metric '{scorer.name}' cannot be had a shard at a time; use l2, l1 or random"
        )
    source, cap = Checkpoint(checkpoint), MemoryCap(max_memory)
    options: dict[str, Any] = {
        "ratio": ratio,
        "target": None if target is None else dict(target),
        "scope": scope,
        "kinds": kinds if kinds is None or isinstance(kinds, str) else list(kinds),
        "ignore": list(ignore),
        "round_to": round_to,
        "min_units": min_units,
        "normalise": normalise or "mean",
        "per": per or "unit",
    }
    job = {"checkpoint": source.identity(), "metric": scorer.name, "seed": seed, **options}
    stored_names(model, source)  # refuses before any work
    folder = _workspace(Path(out), job, resume)
    graph = trace(model, example_inputs)
    cap.check(PIECES_AT_ONCE * PIECE_BYTES)
    told = progress or _silent
    if isinstance(scorer, Norm):
        scores = _norms(scorer, graph, model, source, folder, _Ticker("score", source, cap, told))
    else:
        scores = scorer.score(model, graph, [])
    plan = graph.plan(allocate(graph, scores, **options))
    slicer = ShardedSlicer(model, plan.apply(model), plan, source)
    shards = folder / "model"
    shards.mkdir(exist_ok=True)
    slicer.write(shards, _Ticker("slice", source, cap, told))
    slicer.publish(shards, Path(out))
    shutil.rmtree(folder)
    return plan


def _silent(stage: str, done: int, total: int) -> None:
    pass


class _Ticker:
    """Counts the bytes of a stage, and looks at the memory after each piece."""

    def __init__(
        self, stage: str, checkpoint: Checkpoint, cap: MemoryCap, progress: Progress
    ) -> None:
        self.total = sum(stored.num_bytes for stored in checkpoint.tensors.values())
        self.done = 0
        self._tell = partial(progress, stage)
        self._cap = cap

    def __call__(self, count: int) -> None:
        self.done += count
        self._cap.check()
        self._tell(self.done, self.total)


def _workspace(out: Path, job: dict[str, Any], resume: bool) -> Path:
    """The folder of half-done work: that of the same job when resuming, an empty one else."""
    folder = out.parent / f".{out.name}.partial"
    record = folder / "job.json"
    text = json.dumps(job, indent=1)
    if resume and record.exists():
        if record.read_text(encoding="utf-8") != text:
            raise DepgraphError(
                f"what '{folder}' holds was begun with other arguments or another checkpoint; give "
                "those again, or leave --resume out to begin anew"
            )
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    record.write_text(text, encoding="utf-8")
    return folder


def _norms(
    metric: Norm,
    graph: DependencyGraph,
    model: nn.Module,
    checkpoint: Checkpoint,
    folder: Path,
    tick: _Ticker,
) -> dict[str, Tensor]:
    """Scores from the checkpoint; the sums of each finished shard are kept in the folder."""
    stored = stored_names(model, checkpoint)
    sums: dict[str, Tensor] = {}
    for file in checkpoint.files:
        kept = folder / f"sums-{file}"
        if not kept.exists():
            _save_sums(kept, checkpoint, file, metric.order, tick)
        else:
            tick(sum(checkpoint.tensors[name].num_bytes for name in checkpoint.names(file)))
        sums.update(load_file(kept))

    def of(name: str) -> list[Tensor]:
        dims = range(len(checkpoint.tensors[stored[name]].shape))
        return [sums[f"{stored[name]}:{dim}"] for dim in dims]

    return metric.from_sums(graph, of)


def _save_sums(path: Path, checkpoint: Checkpoint, file: str, order: float, tick: _Ticker) -> None:
    sums: dict[str, Tensor] = {}
    for name in checkpoint.names(file):
        stored = checkpoint.tensors[name]
        if stored.dtype.is_floating_point and stored.shape:
            parts = []
            for _, piece in checkpoint.pieces(name):
                parts.append(power_sums(piece, order))
                tick(piece.nbytes)
            firsts, *rest = zip(*parts, strict=True)
            added = [torch.stack(others).sum(0) for others in rest]
            for dim, values in enumerate([torch.cat(firsts), *added]):
                sums[f"{name}:{dim}"] = values.contiguous()
        else:
            tick(stored.num_bytes)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(sums, temporary)
    temporary.replace(path)
