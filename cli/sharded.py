"""``prune --checkpoint``: weights that stay on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.output import emit, environment, table, write_json
from cli.structures import load_structure
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
    with progress_bar(not as_json) as bar:
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
    dense = sum(p.numel() for p in model.parameters())
    result = {
        "checkpoint": str(checkpoint),
        "model": model_name,
        "metric": metric,
        **choices,
        "seed": seed,
        "max_memory": max_memory,
        "dense": {"params": dense},
        "pruned": {"params": plan.num_params, "macs": plan.macs},
        "out": str(out),
        **environment(),
    }
    write_json(out / "prune.json", result)
    rows = [("parameters", f"{dense:,}", f"{plan.num_params:,}", f"{plan.num_params / dense:.3f}")]
    title = f"{checkpoint} pruned by {metric}, saved in {out}"
    emit(result, as_json, table(title, ["", "dense", "pruned", "kept"], rows))


_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}ib": 1 << 10 * i for i, prefix in enumerate("kmgt", 1)}
_UNITS |= {f"{prefix}b": 1000**i for i, prefix in enumerate("kmgt", 1)}


class Bytes(click.ParamType):
    """A number of bytes, as in ``2GiB``, ``1.5GB`` or ``800MiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes, or a usage error."""
        if isinstance(value, int):
            return value
        text = str(value).strip().lower()
        number = text.rstrip("bikmgt")
        unit = text[len(number) :].strip()
        try:
            count = int(float(number) * _UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            count = 0
        if count < 1:
            self.fail(f"'{value}' is no size; write it like 2GiB or 800MiB", param, ctx)
        return count
