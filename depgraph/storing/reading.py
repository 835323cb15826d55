"""Reads files of a folder that a stranger may have made: those in it alone, and within bounds."""

from __future__ import annotations

import json
import stat
from binascii import crc32
from pathlib import Path
from typing import Any

from depgraph.errors import DepgraphError

MAX_TEXT_BYTES = 64 << 20
"""Largest JSON file that is read: several times the plan of a model of 70 billion parameters."""

_PIECE_BYTES = 4 << 20


def inside(directory: Path, name: str) -> Path:
    """The path of a regular file in a folder.

    Parameters
    ----------
    directory : Path
    name : str
        Without a path. It may be a link within the folder, or within the repository's part of the
        hub's cache (``models--.../snapshots/...``), where every file is one.

    Returns
    -------
    Path

    Raises
    ------
    DepgraphError
        When it is not there, no regular file, or outside the folder.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise DepgraphError(f"'{directory}' names a file {name[:80]!r}, which is not one in it")
    path = directory / name
    above = directory.absolute().parents
    cached = above[0].name == "snapshots" and above[1].name.startswith("models--")
    root = above[1] if cached else directory
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        found, root = path.resolve(), root.resolve()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DepgraphError(f"cannot read '{path}': {reason}") from error
    if not regular or not found.is_relative_to(root):
        raise DepgraphError(f"'{path}' is no file in '{directory}'; copy the file itself there")
    return path


def checksum(directory: Path, name: str) -> str:
    """CRC-32 of a file of a folder: damage is told by it, not deceit.

    Raises
    ------
    DepgraphError
        When it cannot be read.
    """
    path, found = inside(directory, name), 0
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                found = crc32(piece, found)
    except OSError as error:
        raise DepgraphError(f"cannot read '{path}': {error.strerror or error}") from error
    return f"{found:08x}"


def read_text(directory: Path, name: str) -> str:
    """The text of a file of a folder.

    Raises
    ------
    DepgraphError
        When it is not there, too large, or no text.
    """
    path = inside(directory, name)
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise DepgraphError(f"'{path}' has more than {MAX_TEXT_BYTES} bytes; save it again")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DepgraphError(f"cannot read '{path}': {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DepgraphError(f"'{path}' is damaged: it is no text; save it again") from error


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The object that a file of a folder holds.

    Parameters
    ----------
    directory : Path
    name : str

    Returns
    -------
    dict

    Raises
    ------
    DepgraphError
        When the file is not there, too large, or no JSON object with each key once.
    """
    text = read_text(directory, name)
    try:
        return parse_object(text)
    except (ValueError, RecursionError) as error:
        raise DepgraphError(
            f"'{directory / name}' is damaged: {str(error)[:200]}; save the model again"
        ) from error


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object, by the letter of the standard: each key once, no NaN.

    Raises
    ------
    ValueError, RecursionError
        When the text is none.
    """
    data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    if not isinstance(data, dict):
        raise ValueError("no JSON object")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is there twice")
    return made


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
