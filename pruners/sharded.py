"""Scores and slices a checkpoint under a cap on memory; what was done survives a crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from depgraph import DepgraphError, Plan, trace
from depgraph.files import replacing
from depgraph.storing.checkpoint import PIECE_BYTES, Checkpoint
from depgraph.storing.converted import as_named_by
from depgraph.storing.folder import check_place
from depgraph.storing.sharded import ShardedSlicer, stored_names
from pruners.calibration import with_latency
from pruners.choosing.allocation import allocator
from pruners.metrics.magnitude import Norm, Random, add_powers
from pruners.pruning import with_defaults
from pruners.registry import Metric, make_metric
from pruners.speed.latency import LatencyModel
from pruners.statistics.finite import check_weight

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
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
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
    *,
    seed: int = 0,
    max_memory: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    latency: LatencyModel | Mapping[str, Any] | None = None,
    **choices: Any,
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
        Directory of safetensors, in shards or whole. For a model of transformers the names may be
        those that the library writes, which it renames and merges when it loads.
    out : path
        Directory that `depgraph.load` reads, with a shard for each shard. Half-done work is kept
        beside it, in ``.<name>.partial``.
    metric : str or Metric
        ``"l2"``, ``"l1"``, ``"lamp"`` or ``"random"``.
    seed : int
        Of the random metric.
    max_memory : int, optional
        Bytes of resident memory that the process stays below.
    resume : bool
        Go on with what an earlier call with the same arguments began. Shards are the unit: one that
        was not finished is begun again.
    progress : callable, optional
        ``progress(stage, done, total)`` in bytes; stages are ``"score"`` and ``"slice"``.
    latency : LatencyModel or mapping, optional
        See `pruners.prune`; by default of the CPU.
    **choices
        See `allocator`: a ratio (0.5 by default) or a target, and how to share it out.

    Returns
    -------
    Plan

    Raises
    ------
    DepgraphError
        When the checkpoint does not fit the model, has a weight that is not finite, or is where the
        result shall be, the metric looks at data, a choice is out of range, memory does not
        suffice, or the work to resume was begun with other arguments.
    """
    scorer = make_metric(metric, seed=seed)
    if not isinstance(scorer, (Norm, Random)):
        raise DepgraphError(
            f"metric '{scorer.name}' cannot be had a shard at a time; use l2, l1, lamp or random"
        )
    out = Path(out)
    check_place(out)
    source = as_named_by(model, Checkpoint(checkpoint))
    cap, told = MemoryCap(max_memory), progress or _silent
    if out.resolve() == source.directory.resolve():
        raise DepgraphError(f"'{out}' is the checkpoint itself; choose another directory")
    stored = stored_names(model, source)
    graph = trace(model, example_inputs)
    choices = with_defaults(scorer, **choices)
    choose = allocator(graph, **with_latency(graph, choices, latency))
    cap.check(PIECES_AT_ONCE * PIECE_BYTES)
    job = {"checkpoint": source.identity(), "metric": scorer.name, "seed": seed, **choices}
    folder = _workspace(out, job, resume)
    order = scorer.order if isinstance(scorer, Norm) else 1.0
    weights = {stored[name] for name, _ in model.named_parameters()}
    sums = _sums(source, order, folder, weights, _Ticker("score", source, cap, told))
    if isinstance(scorer, Norm):
        scores = scorer.from_sums(graph, lambda name: sums[stored[name]])
    else:
        scores = scorer.score(model, graph, [])
    plan = graph.plan(choose(scores))
    slicer = ShardedSlicer(stored, plan.apply(model), plan, source)
    shards = folder / "model"
    shards.mkdir(exist_ok=True)
    slicer.write(shards, _Ticker("slice", source, cap, told))
    slicer.publish(shards, out)
    shutil.rmtree(folder)
    return plan


def _silent(stage: str, done: int, total: int) -> None:
    pass


class _Ticker:
    """Counts the bytes of a stage, and looks at the memory after each piece."""

    def __init__(
        self, stage: str, checkpoint: Checkpoint, cap: MemoryCap, progress: Progress
    ) -> None:
        self.total = checkpoint.num_bytes(*checkpoint.files)
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
    text = json.dumps(job, indent=1, default=list)
    if resume and record.exists():
        if record.read_text(encoding="utf-8") != text:
            raise DepgraphError(
                f"what '{folder}' holds was begun with other arguments or another checkpoint; give "
                "those again, or leave --resume out to begin anew"
            )
        return folder
    if folder.exists():
        if any(folder.iterdir()) and not record.exists():
            raise DepgraphError(f"'{folder}' is in the way, and not of this tool; move it away")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    record.write_text(text, encoding="utf-8")
    return folder


def _sums(
    checkpoint: Checkpoint, order: float, folder: Path, weights: set[str], tick: _Ticker
) -> dict[str, list[Tensor]]:
    """`power_sums` of every tensor; those of each finished shard are kept in the folder.

    The numbers of weights are seen to be finite on the way.
    """
    sums: dict[str, list[Tensor]] = {}
    for file in checkpoint.files:
        kept = folder / f"sums-{file}"
        if kept.exists():
            tick(checkpoint.num_bytes(file))
        else:
            with replacing(kept) as temporary:
                save_file(_sums_of_shard(checkpoint, file, order, weights, tick), temporary)
        found = load_file(kept)
        for name in checkpoint.names(file):
            dims = range(len(checkpoint.tensors[name].shape))
            sums[name] = [found[f"{name}:{dim}"] for dim in dims]
    return sums


def _sums_of_shard(
    checkpoint: Checkpoint, file: str, order: float, weights: set[str], tick: _Ticker
) -> dict[str, Tensor]:
    def ticking(name: str) -> Iterator[Tensor]:
        for _, piece in checkpoint.pieces(name):
            if name in weights:
                check_weight(name, piece)
            yield piece
            tick(piece.nbytes)

    return {
        f"{name}:{dim}": total.contiguous()
        for name in checkpoint.names(file)
        if checkpoint.tensors[name].shape
        for dim, total in enumerate(add_powers(ticking(name), order))
    }
