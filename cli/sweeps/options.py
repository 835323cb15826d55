"""Options of `run` by their names in a file: turned into a command line, and checked as its own.

So whatever option `run` has is an option of a sweep, with the same checks and defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from cli.options.of_run import options_of_run
from depgraph import DepgraphError

_PLACES = ("data",)
"""Options of `run` that say where, not what."""


@click.command("run")
@options_of_run
def _run(**options: Any) -> None:
    """What `run` does is not done here: its options are parsed alone."""


def run_options() -> dict[str, click.Parameter]:
    """The options of `run` that decide what it does, by name; `model_name` is its argument."""
    return {p.name: p for p in _run.params if p.name is not None and p.name not in _PLACES}


def is_list(name: str) -> bool:
    """Whether one value of the option is a list."""
    option = run_options()[name]
    return getattr(option, "multiple", False) and option.metavar != "KEY=VALUE"


def arguments(options: Mapping[str, Any]) -> list[str]:
    """The command line of `run` that says these options.

    Examples
    --------
    >>> arguments({"model_name": "vit", "metric": "l2", "compensate": False, "kinds": ["heads"]})
    ['vit', '--metric=l2', '--no-compensate', '--kinds=heads']
    """
    known = run_options()
    words = [str(options["model_name"])]
    for name, value in options.items():
        option = known[name]
        if isinstance(option, click.Option):
            words += _words(option, value)
    return words


def _words(option: click.Option, value: Any) -> list[str]:
    flag = option.opts[-1]
    if option.is_flag or isinstance(value, bool):
        if not (option.is_flag and isinstance(value, bool)):
            wanted = "true or false" if option.is_flag else "a value, not true or false"
            raise DepgraphError(f"'{option.name}' is {value!r}; give it {wanted}")
        no = option.secondary_opts[:1]
        return [flag] if value else no
    if isinstance(value, Mapping):
        return [f"{flag}={key}={item!r}" for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [f"{flag}={item}" for item in value]
    return [f"{flag}={value}"]


def parsed(options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of `run`, defaults filled in, as `cli.running.job.make_job` takes them.

    Raises
    ------
    DepgraphError
        For what `run` would refuse.
    """
    words = [*arguments(options), "--data=."]
    try:
        context = _run.make_context("run", words)
    except click.ClickException as error:
        raise DepgraphError(error.format_message()) from error
    return {name: value for name, value in context.params.items() if name not in _PLACES}
