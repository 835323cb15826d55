"""``prune --checkpoint``: weights that stay on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import depgraph
from cli.running.made import holds_model, is_record
from cli.running.pruned import report, show
from cli.running.saved import read_record
from cli.running.structures import load_structure
from cli.verbosity import progress
from depgraph.storing.checkpoint import Checkpoint
from domains import progress_bar
from pruners.sharded import prune_checkpoint


def prune_sharded(
    checkpoint: Path,
    model_name: str | None,
    out: Path,
    metric: str,
    *,
    max_memory: int | None,
    resume: bool,
    as_json: bool,
    seed: int,
    structure: dict[str, Any],
    choices: dict[str, Any],
) -> None:
    """Prune a checkpoint shard by shard, and say what came of it.

    Parameters
    ----------
    checkpoint : Path
    model_name : str, optional
    out : Path
    metric : str
    max_memory : int, optional
        Bytes.
    resume, as_json : bool
    seed : int
    structure : dict
        Arguments of `load_structure`.
    choices : dict
        Arguments of `pruners.allocate`.
    """
    model, inputs = load_structure(checkpoint, model_name, **structure)
    asked = {
        "model": model_name,
        "checkpoint": str(checkpoint),
        "metric": metric,
        "seed": seed,
        **{name: value for name, value in choices.items() if name != "latency"},
        "arguments": structure,
        "files": Checkpoint(checkpoint).identity(),
    }
    record = out / "prune.json"
    if resume and is_record(record) and holds_model(out):
        before = read_record(record)
        if all(before.get(key) == value for key, value in json.loads(json.dumps(asked)).items()):
            show(before, as_json)
            return
    with progress_bar(progress(as_json)) as bar:
        tasks = {stage: bar.add_task(f"{stage} (MiB)", total=None) for stage in ("score", "slice")}

        def tell(stage: str, done: int, total: int) -> None:
            bar.update(tasks[stage], completed=done >> 20, total=total >> 20)

        plan = prune_checkpoint(
            model,
            inputs,
            checkpoint,
            out,
            metric,
            **choices,
            seed=seed,
            max_memory=max_memory,
            resume=resume,
            progress=tell,
        )
    dense = {
        "params": sum(p.numel() for p in model.parameters()),
        "macs": depgraph.count_macs(model, inputs),
    }
    report(out, {**asked, "max_memory": max_memory}, plan, dense, as_json)
