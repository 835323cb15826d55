"""``run``: the whole job on one model and one unseen domain; one result row and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from torch import nn

import domains
from cli.html import report_page
from cli.models import check_classes, load_model
from cli.options import (
    batch_size_option,
    budget,
    clock,
    compute_options,
    data_option,
    json_option,
    metric_and_kinds,
    model_options,
    out_option,
    pruning_options,
    recipe_option,
    resume_option,
    seconds_option,
    seed_option,
    split_option,
    target_option,
    training_options,
)
from cli.output import emit, percent, table, write_text
from cli.pipeline import run_pipeline
from cli.precision import half
from cli.saved import load_saved
from cli.settings import RunSettings, dense_settings, recovery_settings
from domains import timing


@click.command()
@model_options
@data_option
@target_option
@split_option
@pruning_options
@training_options
@click.option("--dense-epochs", type=click.IntRange(0), help="Epochs before pruning  [6].")
@click.option("--dense-lr", type=click.FloatRange(0, min_open=True), help="Rate before pruning.")
@click.option("--dense", type=click.Path(path_type=Path), help="Dense model fine-tuned earlier.")
@recipe_option
@click.option(
    "--distill/--no-distill", default=None, help="Learn from the dense model too  [by recipe]."
)
@batch_size_option(1, "--bench-batch-size", "Images timed at once.")
@seconds_option(10.0)
@out_option
@resume_option
@seed_option
@compute_options
@json_option
def run(
    model_name: str,
    pretrained: bool,
    weights: Path | None,
    img_size: int | None,
    num_classes: int | None,
    model_args: dict[str, Any],
    data: Path,
    target: str,
    split_by: str,
    ratio: float | None,
    target_macs: float | None,
    target_params: float | None,
    target_latency: float | None,
    latency_table: Path | None,
    latency_batch_size: int,
    metric: str | None,
    scope: str,
    kinds: tuple[str, ...],
    ignore: tuple[str, ...],
    round_to: int | str | None,
    min_units: int,
    normalise: str | None,
    per: str | None,
    num_samples: int | None,
    compensate: bool | None,
    num_calibration: int | None,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    dense_epochs: int | None,
    dense_lr: float | None,
    dense: Path | None,
    recipe: str | None,
    distill: bool | None,
    bench_batch_size: int,
    bench_seconds: float,
    out: Path,
    resume: bool,
    seed: int,
    device: str,
    amp: bool,
    as_json: bool,
) -> None:
    """Fine-tune MODEL, prune it, fine-tune again; report accuracy on each domain, and speed.

    Nothing of the --target domain is used before the last step measures on it.
    """
    share = budget(ratio, target_macs, target_params, target_latency)
    chosen_metric, chosen_kinds = metric_and_kinds(metric, kinds)
    found = domains.load_domains(data, progress=not as_json)
    split = domains.leave_one_out(found, target, seed=seed, split_by=split_by)  # type: ignore[arg-type]

    def dense_model() -> nn.Module:
        if dense is not None:
            model = load_saved(dense)
        else:
            model = load_model(
                model_name,
                pretrained=pretrained,
                weights=weights,
                img_size=img_size,
                num_classes=len(found.classes) if num_classes is None else num_classes,
                model_args=model_args,
                seed=seed,
            )
        check_classes(model, len(found.classes), data)
        return model

    recipe = recipe or domains.default_recipe(compensated=compensate is not False)
    said: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "device": device, "amp": amp}
    settings = RunSettings(
        model=model_name,
        share=share,
        pruning={
            "metric": chosen_metric,
            "scope": scope,
            "kinds": chosen_kinds,
            "ignore": ignore,
            "round_to": round_to,
            "min_units": min_units,
            "normalise": normalise,
            "per": per,
            "num_samples": num_samples,
            "compensate": compensate is not False,
            "num_calibration": num_calibration,
        },
        dense=None
        if dense is not None or dense_epochs == 0
        else dense_settings(epochs=dense_epochs, lr=dense_lr, **said),
        recovery=None if epochs == 0 else recovery_settings(recipe, epochs=epochs, lr=lr, **said),
        origin={
            "pretrained": pretrained,
            "weights": None if weights is None else str(weights),
            "dense_from": None if dense is None else str(dense),
            "img_size": img_size,
            "num_classes": num_classes,
            "model_args": model_args,
            "split_by": split_by,
        },
        distill=domains.RECIPES[recipe].distill if distill is None else distill,
        lr_by_share=domains.RECIPES[recipe].by_share and lr is None,
        timing=timing.TimingSettings(
            batch_size=bench_batch_size,
            device=device,
            amp=half(amp, device),
            seconds=bench_seconds,
        ),
        device=device,
        amp=amp,
        seed=seed,
        latency=clock(latency_table, latency_batch_size, device, progress=not as_json),
    )
    result = run_pipeline(dense_model, split, settings, out, resume=resume, progress=not as_json)
    write_text(out / "report.html", report_page(result, found))
    show(result, out, as_json)


def show(result: dict[str, Any], out: Path, as_json: bool) -> None:
    """Print a result row, and where its page is."""
    target = result["target_domain"]
    rows = [
        (
            name + (" (unseen)" if name == target else ""),
            *(percent(result[key]["accuracy"][name]) for key in ("dense", "pruned_only", "pruned")),
        )
        for name in result["dense"]["accuracy"]
    ]
    for label, key in (("parameters", "params"), ("MACs", "macs")):
        rows.append((label, f"{result['dense'][key]:,}", "", f"{result['pruned'][key]:,}"))
    latency = [f"{result[key]['latency_ms']:.2f}" for key in ("dense", "pruned")]
    rows.append(("latency, ms", latency[0], "", f"{latency[1]} ({result['speedup']:.2f}x faster)"))
    columns = ["", "dense", "pruned, not trained", "pruned, fine-tuned"]
    title = f"{result['model']}, metric {result['metric']}"
    emit({**result, "report": str(out / "report.html")}, as_json, table(title, columns, rows))
    if not as_json:
        click.echo(f"\nreport: {(out / 'report.html').resolve()}")
