"""``export``: a saved model as ONNX or as a program of ``torch.export``, for serving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cli.options.shared import batch_size_option, json_option, seconds_option, seed_option
from cli.output import emit, environment, table
from cli.running.made import check_files, force_option, is_own_file
from cli.running.models import example_inputs
from cli.running.saved import load_saved
from cli.showing.served import TOLERANCE, largest_difference, load_served
from cli.showing.speed import speed_says
from depgraph import DepgraphError
from depgraph.exporting.export import (
    NEEDED,
    export_program,
    require_packages,
    write_onnx,
    write_pt2,
)
from depgraph.files import replacing_with_company
from domains.measuring import timing


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["onnx", "pt2"]), required=True)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="File  [DIR/model.FORMAT]."
)
@click.option(
    "--fold/--no-fold",
    default=True,
    show_default=True,
    help="Layer scales, norms, batch norms and emptied branches into the layers beside them.",
)
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Run the file, compare its outputs with the model's, and time both.",
)
@force_option
@batch_size_option(1, says="Images at once, when timed; the file takes any number.")
@seconds_option(5.0, "--seconds")
@seed_option
@json_option
def export(
    directory: Path,
    form: str,
    out: Path | None,
    fold: bool,
    check: bool,
    force: bool,
    batch_size: int,
    seconds: float,
    seed: int,
    as_json: bool,
) -> None:
    """Write the model in DIR as ONNX or for torch.export.load, for batches of any size."""
    if form == "onnx":
        require_packages(*NEEDED, *(["onnxruntime"] if check else []))
    model = load_saved(directory).float()
    if out is None:
        if not directory.is_dir():
            raise click.UsageError(f"say where to write '{directory}' with --out")
        out = directory / f"model.{form}"
    check_files([out, *_company(out, form)], force)
    example = example_inputs(model)
    program, folded = export_program(model, example, folded=fold)
    result: dict[str, Any] = {"format": form, "out": str(out), "folded": folded, "checked": check}
    write = write_onnx if form == "onnx" else write_pt2
    # Checked where it is not yet in anybody's way.
    with _place(out) as trial:
        write(program, trial)
        if check:
            served = load_served(trial, form)
            difference = largest_difference(model, served, example, seed=seed)
            settings = timing.TimingSettings(batch_size=batch_size, seconds=seconds, seed=seed)
            models = {"torch": model, form: served}
            timings = timing.compare(models, tuple(example.shape[1:]), settings)
            result |= {name: asdict(timings[name]) for name in models}
            result |= {
                "difference": difference,
                "tolerance": TOLERANCE,
                "speedup": timings[form].speedup,
                "speedup_interval": timings[form].speedup_interval,
            }
        result["bytes"] = sum(path.stat().st_size for path in trial.parent.iterdir())
    result |= {"seed": seed, **environment()}
    emit(result, as_json, _shown(result, form, batch_size))


def _company(out: Path, form: str) -> list[Path]:
    """Files that may come with it: weights that are too large for ONNX alone."""
    return (
        [out.with_name(f"{out.name}.data")]
        if form == "onnx" and not (out.is_file() and is_own_file(out))
        else []
    )


@contextmanager
def _place(out: Path) -> Iterator[Path]:
    try:
        with replacing_with_company(out) as place:
            yield place
    except OSError as error:
        raise DepgraphError(
            f"cannot write '{out}': {error.strerror}; choose another place"
        ) from error


def _shown(result: dict[str, Any], form: str, batch_size: int) -> Any:
    folded = ", ".join(f"{count} {name}" for name, count in result["folded"].items())
    rows = [("size, MiB", f"{result['bytes'] / 2**20:.1f}"), ("folded", folded or "nothing")]
    if result["checked"]:
        rows += [
            ("largest difference, relative", f"{result['difference']:.1e}"),
            (f"latency of torch, batch {batch_size}, ms", f"{result['torch']['latency_ms']:.2f}"),
            (f"latency of {form}, ms", f"{result[form]['latency_ms']:.2f}"),
            ("against torch", speed_says(result["speedup"], result["speedup_interval"])),
        ]
    return table(f"written to {result['out']}", ["", ""], rows)
