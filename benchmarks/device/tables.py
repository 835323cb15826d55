"""How rows become cells of the page; a row that was not measured says why in its first cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table and the sentence above it."""

    says: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def reason(row: dict[str, Any]) -> str | None:
    """Why a row has no figures; None where it has."""
    if "not_here" in row:
        return f"not here: {row['not_here']}"
    return f"failed: {row['failed']}" if "failed" in row else None


def milliseconds(row: dict[str, Any], key: str = "ms") -> str:
    """Milliseconds with three digits that count, or the reason."""
    return reason(row) or digits(row[key])


def digits(value: float) -> str:
    """Three digits that count, or all before the point."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def padded(first: str, row: dict[str, Any], columns: int) -> tuple[str, ...] | None:
    """The cells of a row without figures; None for one with them."""
    why = reason(row)
    return None if why is None else (first, why, *([""] * (columns - 2)))
