"""How figures are drawn: inline SVG that reads on light and on dark paper, and on a phone."""

from __future__ import annotations

import io
import re
from typing import Any

from markupsafe import escape
from matplotlib.figure import Figure

INK = "#7d8590"
WIDTH = 4.8
"""Inches: narrow, so that letters are large enough where a phone shows all of a figure."""

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "depgraph-prune",
    "text.parse_math": False,  # names may have dollars
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def svg(figure: Figure, says: str) -> str:
    """A figure as SVG, with a sentence for those who do not see it."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata=nothing)
    text = buffer.getvalue()
    body = re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r"\s*\n\s*", " ", text[text.index("<svg") + 4 :]))
    return f'<svg role="img" aria-label="{escape(says)}"{body}'
