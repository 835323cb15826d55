from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

import cli.commands
from cli.main import COMMANDS, program


@pytest.mark.parametrize("call", [["--version"], ["--help"]])
def test_what_needs_no_command_imports_none_and_no_torch(call: list[str]) -> None:
    code = (
        "import sys; from cli.main import program\n"
        f"try: program({call!r}, standalone_mode=False)\n"
        "except Exception as error: print(type(error).__name__)\n"
        "print([name for name in sys.modules if name in ('torch', 'timm', 'plotly')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_completion_imports_no_command() -> None:
    context = click.Context(program)
    found = [item.value for item in program.shell_complete(context, "p")]
    assert found == ["prune", "push-to-hub"]


def test_every_command_is_listed_with_what_it_does() -> None:
    context = click.Context(program)
    files = {path.stem.replace("_", "-") for path in Path(cli.commands.__path__[0]).glob("*.py")}
    assert files - {"--init--"} == COMMANDS.keys()
    for name, text in COMMANDS.items():
        command = program.get_command(context, name)
        assert command is not None and command.name == name
        assert " ".join((command.help or "").partition("\n\n")[0].split()) == text
