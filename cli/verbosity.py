"""``-v`` and ``-q``, on the program and on every command: how much is said on standard error."""

from __future__ import annotations

import logging

import click

LOGGERS = ("depgraph", "pruners", "domains")
_QUIET = "depgraph-prune.quiet"


class _Handler(logging.Handler):
    """Writes to what is standard error at that moment: a run of a sweep has a file in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        from domains.running.processes import is_main  # which imports torch

        if is_main():
            click.echo(self.format(record), err=True)


_handler = _Handler()
_handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S"))


def _louder(ctx: click.Context, param: click.Parameter, count: int) -> None:
    if count:
        for name in LOGGERS:
            logger = logging.getLogger(name)
            logger.setLevel(logging.DEBUG if count > 1 else logging.INFO)
            logger.addHandler(_handler)
        ctx.find_root().call_on_close(_as_before)


def _as_before() -> None:
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(_handler)


def _quieter(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_QUIET] = True


def options() -> list[click.Option]:
    """The two options."""
    return [
        click.Option(
            ["-v", "--verbose"],
            count=True,
            expose_value=False,
            is_eager=True,
            callback=_louder,
            help="Log what is done on standard error; twice: more.",
        ),
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_quieter,
            help="No progress and no notes, only errors.",
        ),
    ]


def add_to(command: click.Command) -> None:
    """Give the options to a command and to those in it."""
    command.params += options()
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            add_to(inner)


def is_quiet() -> bool:
    """Whether ``-q`` was given."""
    ctx = click.get_current_context(silent=True)
    return ctx is not None and bool(ctx.meta.get(_QUIET))


def progress(as_json: bool) -> bool:
    """Whether a command shows how far it is."""
    return not (as_json or is_quiet())
