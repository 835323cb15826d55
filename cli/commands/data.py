"""``data``: archives made into folders, and folders checked, before any training."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import click
from PIL.PngImagePlugin import PngInfo
from rich.console import Console

import domains
from cli.options.params import Bytes
from cli.options.shared import json_option
from cli.output import emit, table, write_bytes
from cli.running.made import check_files, force_option
from cli.showing.sheet import contact_sheet
from cli.verbosity import progress
from depgraph.files import MARK


@click.group()
def data() -> None:
    """Make archives into folders of images by domain and class, and check such folders."""


@data.command()
@click.argument("sources", metavar="ARCHIVE...", nargs=-1, required=True)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="The ROOT to make: new, empty, or of an earlier call with the same archives.",
)
@click.option("--inside", help="The folder in the archives that holds the domains  [found].")
@click.option(
    "--max-size",
    type=Bytes(),
    default=f"{domains.DEFAULT_LIMIT // 2**30}GiB",
    show_default=True,
    help="Refuse to write more than this.",
)
@json_option
def unpack(
    sources: tuple[str, ...], out: Path, inside: str | None, max_size: int, as_json: bool
) -> None:
    """Write the images of ARCHIVE... as ROOT/<domain>/<class>/<image>.

    An ARCHIVE is a zip or tar of PACS, Office-Home and the like, with or without folders above the
    domains; a file of PACS's hdf5; a folder that Hugging Face datasets saved; or hf:owner/name.
    Several are put together. The same call again continues one that was interrupted.
    """
    done = domains.unpack(
        sources, out, max_bytes=max_size, inside=inside, progress=progress(as_json)
    )
    result = {
        "out": str(out),
        "images": done.images,
        "written": done.written,
        "skipped": done.skipped,
    }
    rows = [(name, f"{count:,}") for name, count in done.images.items()]
    rows.append(("all", f"{sum(done.images.values()):,}"))
    title = f"{out}: {done.written:,} images written, {done.skipped:,} other files left out"
    emit(result, as_json, table(title, ["domain", "images"], rows))


@data.command()
@click.argument("root", metavar="ROOT", type=click.Path(path_type=Path))
@click.option(
    "--as",
    "known",
    type=click.Choice([*domains.KNOWN, "none"]),
    help="Compare with this data set's published counts, or with none  [recognised].",
)
@click.option(
    "--sheet",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a contact sheet, a PNG file, here.",
)
@click.option(
    "--sheet-images",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Images on it of each class in each domain.",
)
@force_option
@json_option
@click.pass_context
def check(
    ctx: click.Context,
    root: Path,
    known: str | None,
    sheet: Path | None,
    sheet_images: int,
    force: bool,
    as_json: bool,
) -> None:
    """Count the images in ROOT/<domain>/<class>/ and say all that is wrong with them.

    Known data sets are recognised by their domains and classes, and their counts compared. Exits 1
    when something is wrong.
    """
    if sheet is not None:
        check_files([sheet], force, "--sheet")
    report = domains.check_data(root, known=known, progress=progress(as_json))
    if sheet is not None:
        buffer, said = io.BytesIO(), PngInfo()
        said.add_text("Software", MARK)
        contact_sheet(report, sheet_images).save(buffer, "PNG", pnginfo=said)
        write_bytes(sheet, buffer.getvalue())
    emit(_result(report, sheet), as_json, _counts(report))
    if not as_json:
        console = Console()
        for problem in report.problems:
            console.print(f"- {problem}", markup=False, highlight=False, soft_wrap=True)
        console.print(_verdict(report), markup=False, highlight=False, soft_wrap=True)
    if report.problems:
        ctx.exit(1)


def _result(report: domains.DataReport, sheet: Path | None) -> dict[str, Any]:
    known = report.known
    return {
        "root": str(report.root),
        "known": None if known is None else known.name,
        "expected": None if known is None else {**known.domains, "all": known.total},
        "classes": list(report.classes),
        "images": report.counts,
        "problems": list(report.problems),
        "sheet": None if sheet is None else str(sheet),
    }


def _counts(report: domains.DataReport) -> Any:
    counts = report.counts
    rows = [(name, *(f"{counts[domain][name]:,}" for domain in counts)) for name in report.classes]
    totals = {domain: sum(by_class.values()) for domain, by_class in counts.items()}
    rows.append(("all", *(f"{total:,}" for total in totals.values())))
    known = report.known
    if known is not None:
        usual = {folder: known.domain_of(folder) for folder in counts}
        published = [known.domains.get(usual[folder] or "") for folder in counts]
        rows.append(("published", *("" if n is None else f"{n:,}" for n in published)))
    name = "no known data set" if known is None else known.name
    title = f"{report.root}: {name}, {sum(totals.values()):,} images"
    return table(title, ["class", *counts], rows)


def _verdict(report: domains.DataReport) -> str:
    if report.problems:
        return f"{len(report.problems):,} problems"
    if report.known is None:
        return "nothing is wrong; no published counts to compare with"
    return f"complete and sound: {report.known.name} ({report.known.source})"
