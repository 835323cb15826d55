"""What `prune` says and writes down, however it came by the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import depgraph
from cli.output import MACS_NOTE, emit, environment, table, write_json
from cli.running.made import is_record


def report(
    out: Path, said: dict[str, Any], plan: depgraph.Plan, dense: dict[str, int], as_json: bool
) -> None:
    """Write what came of a pruning to ``prune.json`` beside the model, and print it.

    Parameters
    ----------
    out : Path
    said : dict
        What was asked for; ``"compensated"`` where the cut was.
    plan : Plan
    dense : dict
        ``"params"`` and ``"macs"`` before.
    as_json : bool
    """
    pruned = {"params": plan.num_params, "macs": plan.macs}
    result = {
        "compensated": False,
        **said,
        "dense": dense,
        "pruned": pruned,
        "groups": {
            name: {"kept": len(plan.kept_units.get(name, range(size))), "size": size}
            for name, size in plan.sizes.items()
        },
        "out": str(out),
        **environment(),
    }
    write_json(out / "prune.json", result)
    if is_record(out / "finetune.json"):  # of the model that was here before
        (out / "finetune.json").unlink()
    show(result, as_json)


def show(record: dict[str, Any], as_json: bool) -> None:
    """Print what came of a pruning."""
    dense, pruned = record["dense"], record["pruned"]
    rows = [
        (name, f"{dense[key]:,}", f"{pruned[key]:,}", f"{pruned[key] / dense[key]:.3f}")
        for name, key in (("parameters", "params"), ("MACs", "macs"))
    ]
    of, by = record["model"] or record["checkpoint"], record["metric"]
    title = f"{of} pruned by {by}, saved in {record['out']}"
    emit(record, as_json, table(title, ["", "dense", "pruned", "kept"], rows, MACS_NOTE))
