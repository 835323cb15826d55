"""How results reach people and programs: rich tables, one JSON object, files written whole."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import timm
import torch
from rich.console import Console
from rich.table import Table

from cli.escapes import readable
from cli.verbosity import is_quiet
from cli.version import program_version
from depgraph import DepgraphError
from depgraph.files import replacing
from domains.running.processes import is_main


def emit(result: dict[str, Any], as_json: bool, *tables: Table) -> None:
    """Print a result: as JSON on standard output, or as tables; of several processes, one does."""
    if not is_main():
        return
    if as_json:
        click.echo(json.dumps(result))
        return
    console = Console()
    for table in tables:
        console.print(table)


def note(text: str) -> None:
    """A line for people, on standard error, so that ``--json`` stays one object."""
    if is_main() and not is_quiet():
        click.echo(text, err=True)


MACS_NOTE = (
    "MACs are the multiply-accumulates of one image: matrix products, convolutions, attention "
    "(queries with keys, weights with values) and recurrent layers. Norms, softmax, biases and "
    "elementwise work are not in them. Other counters leave out more: docs/macs.md compares some."
)
"""What commands say that print MACs."""


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str | None = None
) -> Table:
    """A table whose first column is text and whose others are aligned right."""
    out = Table(title=title, title_justify="left", caption=note, caption_justify="left")
    for i, column in enumerate(columns):
        out.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        out.add_row(*map(str, row))
    return out


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return "" if share is None else f"{100 * share:.1f}".removesuffix(".0") + "%"


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; of several processes, the main one does.

    Raises
    ------
    DepgraphError
        When it cannot be written.
    """
    write_bytes(path, readable(text).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; of several processes, the main one does.

    Raises
    ------
    DepgraphError
        When it cannot be written.
    """
    if not is_main():
        return
    check_replaceable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise DepgraphError(
            f"cannot write '{path}': {error.strerror}; choose another place"
        ) from error


def check_replaceable(path: Path) -> None:
    """Refuse a path that is there and no ordinary file: renaming over a device would remove it."""
    if path.exists() and not path.is_file():
        raise DepgraphError(f"'{path}' is no ordinary file; choose another place")


def check_apart(out: Path, data: Path) -> None:
    """Refuse results in the folder of the images: the next call would take them for a domain."""
    if out.resolve().is_relative_to(data.resolve()):
        raise DepgraphError(f"'{out}' is in the folder of images '{data}'; choose another --out")


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(data, indent=1))


def command_line() -> str:
    """How the program was called."""
    text: str = readable(shlex.join(["depgraph-prune", *sys.argv[1:]]))
    return text


def environment() -> dict[str, Any]:
    """Versions, device and command line, to be able to make a result again."""
    cuda = torch.cuda.is_available()
    return {
        "command": command_line(),
        "versions": {
            "depgraph-prune": program_version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "machine": {
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
        },
    }
