"""``run``: the whole job on one model and one unseen domain; one result row and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import domains
from cli.options.of_run import options_of_run
from cli.options.said import BUDGETS, budget
from cli.options.shared import json_option, out_option, resume_option, track_option
from cli.output import check_apart, write_text
from cli.running.job import make_job
from cli.running.made import force_option
from cli.running.pipeline import run_pipeline
from cli.running.rows import finished_row
from cli.showing.html import report_page
from cli.showing.shown import show
from cli.verbosity import progress


@click.command()
@options_of_run
@out_option
@force_option
@resume_option
@track_option
@json_option
def run(
    out: Path,
    force: bool,
    resume: bool,
    track: str | None,
    as_json: bool,
    data: Path,
    **options: Any,
) -> None:
    """Fine-tune MODEL, prune it, fine-tune again; report accuracy on each domain, and speed.

    Nothing of the --target domain is used before the last step measures on it.
    """
    budget(**{name: options[name] for name in BUDGETS})  # refused before the data is read
    check_apart(out, data)
    found = domains.load_domains(data, progress=progress(as_json))
    job = make_job(found, progress=progress(as_json), **options)
    before = finished_row(out / "result.json")
    result = run_pipeline(
        job.model,
        job.split,
        job.settings,
        out,
        resume=resume,
        force=force,
        progress=progress(as_json),
        track=track,
    )
    if result != before or not (out / "report.html").exists():
        write_text(out / "report.html", report_page(result, found))
    show(result, out, as_json)
