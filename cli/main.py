"""Entry point: the click group, and the one place where errors become sentences and exit codes."""

from __future__ import annotations

import io
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from cli import verbosity
from cli.commands.bench import bench
from cli.commands.data import data
from cli.commands.demo import demo
from cli.commands.evaluate import evaluate
from cli.commands.export import export
from cli.commands.finetune import finetune
from cli.commands.inspect import inspect
from cli.commands.metrics import metrics
from cli.commands.prune import prune
from cli.commands.push_to_hub import push_to_hub
from cli.commands.report import report
from cli.commands.run import run
from cli.commands.sweep import sweep
from cli.options.failures import FAILURES, sentence
from domains.running.processes import is_main


def program_version() -> str:
    """Version of the installed program."""
    try:
        return version("depgraph-prune")
    except PackageNotFoundError:
        return "unknown"


class Program(click.Group):
    """A group whose commands fail with one sentence, or with a traceback under ``--debug``."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit 1 for a failed run, whatever raised, 130 for Ctrl-C."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a file name may be no UTF-8
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, *FAILURES) as error:
            if isinstance(error, (click.exceptions.Exit, click.Abort)):
                raise
            if ctx.params.get("debug"):
                traceback.print_exc()
            if is_main() or not isinstance(error, KeyboardInterrupt):  # which all processes get
                click.echo(f"depgraph-prune: {sentence(error)}", err=True)
            # 130: what shells say of Ctrl-C, so that scripts can tell it from a failure
            ctx.exit(130 if isinstance(error, KeyboardInterrupt) else 1)


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(program_version(), prog_name="depgraph-prune")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def program(debug: bool) -> None:
    """Prune vision transformers by their dependency graph, and judge them on an unseen domain."""


for command in (
    *(demo, inspect, metrics, prune, finetune, evaluate, bench, run),
    *(sweep, report, data, export, push_to_hub),
):
    program.add_command(command)
verbosity.add_to(program)


def main() -> None:
    """Console script."""
    sys.exit(program(prog_name="depgraph-prune"))


if __name__ == "__main__":
    main()
