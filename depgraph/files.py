"""Files written whole or not at all, with the modes that the umask gives.

What is written goes to a temporary name in the same directory, new for each call, and is renamed:
no reader sees half a file, and no two writers meet. Some writers (safetensors, `tempfile`) give
their files to one user alone; here every file gets the mode that `open` would give it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = "made by depgraph-prune"
"""Stands in what this tool writes, so that it knows its own files from those of others."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write in the place of `path`, which it becomes at the end.

    Parameters
    ----------
    path : Path
        In a directory that is there.

    Yields
    ------
    Path
        Of an empty file in the same directory. On any error it is removed, and `path` is as before.

    Raises
    ------
    OSError
        When it cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp()) / "text"
    >>> with replacing(place) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> place.read_text()
    'whole'
    """
    temporary = _beside(path)
    mode = _create(temporary)
    try:
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_with_company(path: Path) -> Iterator[Path]:
    """As `replacing`, for a file that may come with others: all that is written beside it moves.

    Parameters
    ----------
    path : Path
        Its directory is made where there is none.

    Yields
    ------
    Path
        Of the same name, in a temporary directory.

    Raises
    ------
    OSError
        When it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = _beside(path)
    folder.mkdir()
    try:
        yield folder / path.name
        set_modes(folder)
        # the file itself last: it is what tells that all is there
        for made in sorted(folder.iterdir(), key=lambda made: made.name == path.name):
            os.replace(made, path.with_name(made.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def set_modes(folder: Path) -> None:
    """Give all files of a directory the mode that the umask gives."""
    probe = folder / f".{secrets.token_hex(8)}.tmp"
    mode = _create(probe)
    probe.unlink()
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode)


def temporary_prefix(path: Path) -> str:
    """How the temporary names of a file begin: what was killed left them behind."""
    return f".{path.name[:40]}."  # as long names are, with what comes behind, too long for a file


def _beside(path: Path) -> Path:
    return path.with_name(f"{temporary_prefix(path)}{secrets.token_hex(8)}.tmp")


def _create(path: Path) -> int:
    """Make an empty file; its mode, which only the making of a file tells without a race."""
    with path.open("xb") as file:
        return stat.S_IMODE(os.fstat(file.fileno()).st_mode)
