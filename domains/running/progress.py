"""The one progress bar of the package; on standard error, so that `--json` output stays clean."""

import logging
import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from domains.running.processes import is_main


def tell(line: str, progress: bool) -> None:
    """Say how far something is: to whoever logs; else, where no bar can be drawn, as a line.

    Parameters
    ----------
    line : str
    progress : bool
        Whether a bar is wanted, on a terminal.
    """
    logger = logging.getLogger("domains")
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    elif progress and is_main() and not sys.stderr.isatty():
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """A time to wait, roughly.

    Examples
    --------
    >>> duration(42.4), duration(600), duration(8000)
    ('42 s', '10 min', '2 h 13 min')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def progress_bar(enabled: bool) -> Progress:
    """Return a rich progress display, silent when not `enabled` or not in the main process.

    Without a terminal, where it would be blank lines, it is silent too.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not (enabled and is_main() and sys.stderr.isatty()),
    )
