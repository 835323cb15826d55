"""Text in the formats that results are written in: one function for each says how it is escaped.

Names come from folders, files and options, and may hold anything. HTML is escaped by Jinja itself.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader


class Raw(str):
    """Text that is written as it is: it is in the format already."""


def readable(value: Any) -> Any:
    """A value whose texts can be written as UTF-8: lone surrogates are spelled out.

    File names that are no UTF-8 have them. Mappings and sequences are gone through.

    Examples
    --------
    >>> readable({"caf\\udce9": ["a", 1]}) == {"caf" + chr(92) + "udce9": ["a", 1]}
    True
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {readable(key): readable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(readable(item) for item in value)
    return value


def one_line(value: Any) -> str:
    """Text without line breaks and other control characters, a space in their place."""
    text = readable(str(value))
    return "".join(" " if _breaks(character) else character for character in text)


def _breaks(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Zl", "Zp")


_TEX = {character: f"\\{character}" for character in "&%$#_{}"}
_TEX |= {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # the end of a row before takes these as its own
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
}


def tex(value: Any) -> str:
    """Text for LaTeX, in a cell, a caption or a comment.

    Examples
    --------
    >>> print(tex("50% of a_b"))
    50\\% of a\\_b
    """
    return "".join(_TEX.get(character, character) for character in one_line(value))


_MARKDOWN = re.compile(r"[\\`*\[\]<>|$~#]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])|&(?=\S)")


def markdown(value: Any) -> str:
    """Text for Markdown, in a cell of a table or a heading: no markup, no HTML.

    Examples
    --------
    >>> print(markdown("a|b <i>c</i> vit_tiny"))
    a\\|b &lt;i&gt;c&lt;/i&gt; vit_tiny
    """
    return _MARKDOWN.sub(lambda found: _in_markdown(found[0]), one_line(value))


def _in_markdown(character: str) -> str:
    entities = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
    return entities.get(character, f"\\{character}")


def fenced(value: Any, language: str = "") -> Raw:
    """Lines of code for Markdown, in a fence that is longer than any in it."""
    text = readable(str(value))
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Raw(f"{fence}{language}\n{text}\n{fence}")


_FORMULA = tuple("=+-@＝＋－＠")  # noqa: RUF001: spreadsheets take the wide ones too


def cell(value: Any) -> Any:
    """A cell of CSV: a text that spreadsheets would take for a formula gets a quote before it.

    Examples
    --------
    >>> cell("=1+1"), cell(-0.5), cell(None)
    ("'=1+1", -0.5, None)
    """
    if not isinstance(value, str) or _is_number(value):
        return value
    text = one_line(value)
    taken = text.lstrip().startswith(_FORMULA) or value.startswith(("\t", "\r", "\n"))
    return f"'{text}" if taken else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and text == text.strip()


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([cell(value) for value in row] for row in rows)
    return out.getvalue()


def templates(escape: Callable[[Any], str]) -> Environment:
    """Templates of the package in which all that is put in is escaped, but for what is `Raw`."""
    return Environment(
        loader=PackageLoader("cli"),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        finalize=lambda value: value if isinstance(value, Raw) else escape(value),
    )
