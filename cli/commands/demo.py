"""``demo``: the whole job on the embedded digits, offline, in minutes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

import domains
from cli.options.params import Share
from cli.options.said import metric_and_kinds
from cli.options.shared import json_option, metric_option, seed_option
from cli.output import note, write_text
from cli.running.made import force_option, is_record
from cli.running.pipeline import run_pipeline
from cli.running.settings import RunSettings
from cli.showing.html import report_page
from cli.showing.shown import show
from cli.verbosity import progress
from domains.measuring import timing


@click.command()
@click.option(
    "--model",
    "family",
    type=click.Choice(list(domains.DIGITS_MODELS)),
    default="vit",
    show_default=True,
)
@click.option(
    "--target",
    type=click.Choice(["scan", "photo", "outline", "poster"]),
    default="outline",
    show_default=True,
    help="Target domain, held out of training.",
)
@click.option(
    "--ratio", default=0.5, show_default=True, type=Share(), help="Share of the units to remove."
)
@metric_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    show_default=True,
)
@click.option("--quick", is_flag=True, help="A few images and one epoch, to see that it runs.")
@force_option
@seed_option
@json_option
def demo(
    family: str,
    target: str,
    ratio: float,
    metric: str | None,
    out: Path,
    quick: bool,
    force: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Train, prune, fine-tune and time a small transformer on handwritten digits.

    The digits are drawn in four styles, of which --target is held out.
    """
    root = domains.write_digits(
        out / f"digits{'-quick' if quick else ''}",
        seed=seed,
        per_class=10 if quick else None,
        progress=progress(as_json),
    )
    found = domains.load_domains(root)
    split = domains.leave_one_out(found, target, seed=seed, split_by="stem")
    chosen, kinds = metric_and_kinds(metric, ())
    said: dict[str, Any] = {"seed": seed, "device": "cpu"}
    said |= {"epochs": 1, "warmup_epochs": 0.5} if quick else {}
    settings = RunSettings(
        model=f"{domains.DIGITS_MODELS[family].name} (digits)",
        share={"ratio": ratio},
        pruning={"metric": chosen, "kinds": kinds},
        dense=replace(domains.DIGITS_RECIPE, **said),
        recovery=replace(domains.DIGITS_RECOVERY, **said),
        timing=timing.TimingSettings(batch_size=16, seconds=1.0 if quick else 5.0),
        seed=seed,
    )
    run_out = out / f"{family}-{target}-{chosen}-{ratio:g}{'-quick' if quick else ''}-seed{seed}"
    again = is_record(run_out / "result.json")
    if again:
        note(f"'{run_out}' is finished already; it is made anew")
    threads = torch.get_num_threads()
    # Ops this small only wait for each other on more threads, the more so on a busy machine.
    torch.set_num_threads(1)
    try:
        result = run_pipeline(
            lambda: domains.digits_model(family, seed=seed),
            split,
            settings,
            run_out,
            resume=not again,
            force=force or again,
            progress=progress(as_json),
        )
    finally:
        torch.set_num_threads(threads)
    write_text(run_out / "report.html", report_page(result, found))
    show(result, run_out, as_json)
