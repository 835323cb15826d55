"""Entry point: the click group, and the one place where errors become sentences and exit codes.

Commands are imported when they are called: ``--version``, ``--help`` and shell completion need none
of them, nor torch.
"""

from __future__ import annotations

import io
import sys
import traceback
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from cli import verbosity
from cli.version import program_version

COMMANDS = {
    "bench": "Time the model in DIR beside its dense original.",
    "data": "Make archives into folders of images by domain and class, and check such folders.",
    "demo": "Train, prune, fine-tune and time a small transformer on handwritten digits.",
    "evaluate": "Measure the accuracy of the model in DIR on every domain.",
    "export": "Write the model in DIR as ONNX or for torch.export.load, for batches of any size.",
    "finetune": "Fine-tune the model in DIR on all domains of --data but --target.",
    "inspect": "Show the groups of coupled weights in MODEL.",
    "metrics": "List the metrics that units can be scored with.",
    "prune": "Prune MODEL and save the smaller one in --out.",
    "push-to-hub": 'Share the model in DIR as OWNER/NAME, for depgraph.load("hf-hub:OWNER/NAME").',
    "report": "Average all results of `run`, `demo` and `sweep` below DIRECTORY, and draw them.",
    "run": "Fine-tune MODEL, prune it, fine-tune again; report accuracy on each domain, and speed.",
    "sweep": "Do all runs that FILE asks for, each as `run` would; what is done is not done again.",
}
"""The first sentence of each command, by its name, which its module and its function have too."""


class Program(click.Group):
    """A group whose commands fail with one sentence, or with a traceback under ``--debug``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a command."""
        if name not in COMMANDS:
            return None
        if name not in self.commands:
            word = name.replace("-", "_")
            command: click.Command = getattr(import_module(f"cli.commands.{word}"), word)
            verbosity.add_to(command)
            self.add_command(command, name)
        return self.commands[name]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the name of a command without importing any."""
        names = [name for name in COMMANDS if name.startswith(incomplete)]
        items = [CompletionItem(name, help=COMMANDS[name]) for name in names]
        return items + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit 1 for a failed run, whatever raised, 130 for Ctrl-C."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a file name may be no UTF-8
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Exception) as error:
            from cli.options.failures import FAILURES, sentence
            from domains.running.processes import is_main

            known = isinstance(error, (KeyboardInterrupt, *FAILURES))
            if not known or isinstance(error, (click.exceptions.Exit, click.Abort)):
                raise
            if ctx.params.get("debug"):
                traceback.print_exc()
            # Ctrl-C reaches all processes of a run
            if is_main() or not isinstance(error, KeyboardInterrupt):
                click.echo(f"depgraph-prune: {sentence(error)}", err=True)
            # 130: what shells say of Ctrl-C, so that scripts can tell it from a failure
            ctx.exit(130 if isinstance(error, KeyboardInterrupt) else 1)


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(program_version(), prog_name="depgraph-prune")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def program(debug: bool) -> None:
    """Prune vision transformers by their dependency graph, and judge them on an unseen domain."""


verbosity.add_to(program)


def main() -> None:
    """Console script."""
    sys.exit(program(prog_name="depgraph-prune"))


if __name__ == "__main__":
    main()
