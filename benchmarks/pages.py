"""What the benchmarks' pages in `docs` are made of."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

from matplotlib.figure import Figure


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def png(figure: Figure) -> bytes:
    """A figure as a PNG file's content."""
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def with_section(page: Path, heading: str, body: str | None) -> str:
    """A page's text with its last section, of that heading, replaced or added.

    Parameters
    ----------
    page : Path
        Need not exist.
    heading : str
        With its ``#``.
    body : str or None
        None: the section alone, as it stands in the page; empty where there is none.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, found, section = text.partition(f"\n{heading}\n")
    if body is None:
        return f"{found}{section}"
    return f"{before.rstrip()}\n\n{heading}\n\n{body}"
