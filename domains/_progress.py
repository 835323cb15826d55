"""The one progress bar of the package; on standard error, so that `--json` output stays clean."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from domains.processes import is_main


def progress_bar(enabled: bool) -> Progress:
    """Return a rich progress display, silent when not `enabled` or not in the main process."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not (enabled and is_main()),
    )
