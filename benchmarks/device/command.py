"""The command: which steps are left, each in its turn, and the page after each."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from filelock import FileLock, Timeout

from benchmarks.device.page import page
from benchmarks.device.record import CUT, DONE, FAILED, NOT_HERE, Record, read
from benchmarks.device.settings import NAMES, Settings, ViT
from benchmarks.device.steps import FIRST, STEPS, Step
from benchmarks.device.worker import Stopped, run_step, stoppable
from cli.output import note, write_json, write_text
from depgraph import DepgraphError

LEAST = 4.0
"""Seconds that have to be left for a step to begin."""

MARK = "run.json"


class Seconds(click.ParamType):
    """``90s`` or ``8m``."""

    name = "TIME"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Seconds."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m)", str(value))
        if found is None:
            self.fail(f"'{value}' is no time; give 90s or 8m", param, ctx)
        return float(found[1]) * (60 if found[2] == "m" else 1)


class Session:
    """One call of the command in a folder of results.

    Parameters
    ----------
    settings : Settings
    copy_to : Path, optional
        Where the page is put too.
    budget : float
        Seconds for this call.
    """

    def __init__(self, settings: Settings, copy_to: Path | None, budget: float) -> None:
        self.settings, self.copy_to = settings, copy_to
        self.end = time.monotonic() + budget
        self.method = "fork"
        self.about = _opened(settings)
        self.records = {step.name: self._record(step) for step in STEPS}

    def _identity(self, step: Step) -> dict[str, Any]:
        asked = {"device": self.settings.device, "size": self.settings.size}
        return asked | step.identity(self.settings)

    def _record(self, step: Step) -> Record:
        record = Record(self.settings.out / f"{step.name}.json", self._identity(step))
        if not record.rows and record.state == CUT:
            record.data["reason"] = "not reached"
        return record

    def work(self) -> None:
        """Do all steps that are left."""
        self._machine()
        for step in STEPS[1:]:
            self._one(step)

    def _machine(self) -> None:
        """Run the first step anew: another machine must not go on with what this one measured."""
        before = dict(self.records[FIRST.name].facts)
        record = self._run(FIRST, self._time_for(FIRST))
        if record.state != DONE and self.settings.cuda:
            note(f"{record.data['reason']}; again in fresh processes")
            self.method = "spawn"
            record = self._run(FIRST, self._time_for(FIRST))
        if not record.facts:
            raise DepgraphError(f"the device does not answer: {record.data['reason']}")
        for name in ("device", "driver", "torch"):
            if before and before.get(name) != record.facts.get(name):
                record.facts.update(before)
                record.save()
                raise DepgraphError(
                    f"'{self.settings.out}' holds what {before.get('device')} with torch "
                    f"{before.get('torch')} measured; choose another --out"
                )

    def _one(self, step: Step) -> None:
        record = self.records[step.name]
        why = step.skip(self.settings)
        if record.state == DONE and why is None:
            return
        left = self._time_for(step)
        if why is not None:
            record.save(state=NOT_HERE, reason=why)
        elif left < LEAST:
            record.save(state=CUT, reason=record.data["reason"] or "not reached: no time was left")
        else:
            self._run(step, left)
        self.show()

    def _time_for(self, step: Step) -> float:
        return min(step.limit(self.settings), self.end - time.monotonic())

    def _run(self, step: Step, limit: float) -> Record:
        note(f"{step.title} (at most {limit:.0f} s) ...")
        try:
            run_step(step.name, self.settings, self._identity(step), limit, self.method)
        finally:
            record = self.records[step.name] = self._record(step)
            why = f": {record.data['reason']}" if record.data["reason"] else ""
            note(f"  {record.state}{why}, {record.data['seconds']:.0f} s")
            self.show()
        return record

    def show(self) -> None:
        """Make the page of what there is."""
        text = page(self.settings, self.records, self.about)
        write_text(self.settings.out / "device.md", text)
        if self.copy_to is not None:
            write_text(self.copy_to, text)


def _opened(settings: Settings) -> dict[str, str]:
    """Take a folder for results, or one with results of the same kind; what the page says of it.

    Raises
    ------
    DepgraphError
        Where the folder holds anything else.
    """
    out, kind = settings.out, {"device": settings.device, "size": settings.size}
    mark = read(out / MARK)
    if not mark and any(path.name != ".lock" for path in out.iterdir()):
        raise DepgraphError(f"'{out}' holds something else; choose another --out")
    if mark and mark.get("kind") != kind:
        raise DepgraphError(
            f"'{out}' holds results of {json.dumps(mark.get('kind'))}, not {json.dumps(kind)}; "
            "choose another --out"
        )
    calls = [*mark.get("calls", []), _call()]
    write_json(out / MARK, {"kind": kind, "calls": calls})
    said = {name: list(dict.fromkeys(call[name] for call in calls)) for name in calls[0]}
    return {
        "commands": " and ".join(f"`{command}`" for command in said["command"]),
        "commits": " and ".join(said["commit"]),
        "dates": " and ".join(said["date"]),
    }


def _call() -> dict[str, str]:
    command = shlex.join(["python", "-m", "benchmarks.device", *sys.argv[1:]])
    return {
        "command": command,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="minutes").removesuffix("+00:00") + " UTC",
    }


def _commit() -> str:
    """The commit of the checkout; it may have been carried somewhere without its history."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown (no git)"
    return done.stdout.strip() or "unknown (no git history beside the files)"


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise DepgraphError(f"another call is at work in '{out}'; wait for it") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise DepgraphError(f"'{out}' is no folder; choose another --out") from error


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--quick", is_flag=True, help="The main cases alone.")
@click.option("--tiny", is_flag=True, help="Models of a few weights: that it runs, as the tests.")
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:N or cpu.")
@click.option("--budget", type=Seconds(), help="For this call  [8m, --quick 3m; no limit on cpu].")
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="ROOT/<domain>/<class>/<image>, for the accuracy grid.",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Of the model that is trained on it  [random].",
)
@click.option("--model", default=NAMES[ViT], show_default=True, help="timm name of that model.")
@click.option(
    "--page",
    "copy_to",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Put the page here too, besides in the folder as device.md.",
)
def main(
    out: Path,
    quick: bool,
    tiny: bool,
    device: str,
    budget: float | None,
    data: Path | None,
    weights: Path | None,
    model: str,
    copy_to: Path | None,
) -> None:
    """Measure all that a device can tell, most important first.

    What is finished in --out is not measured again; what was cut is gone on with.
    """
    if quick and tiny:
        raise click.UsageError("--quick and --tiny are two sizes; choose one")
    size = "tiny" if tiny else "quick" if quick else "full"
    settings = Settings(out.resolve(), device, size, data, weights, model)
    try:
        with _alone(settings.out):
            session = Session(
                settings, copy_to, settings.sizes.budget if budget is None else budget
            )
            with stoppable():
                session.work()
            session.show()
    except DepgraphError as error:
        raise click.ClickException(str(error)) from error
    except (KeyboardInterrupt, Stopped):
        note(f"interrupted; the same command goes on. The page so far: {out / 'device.md'}")
        raise click.exceptions.Exit(130) from None
    bad = [name for name, record in session.records.items() if record.state in (CUT, FAILED)]
    click.echo(f"page: {settings.out / 'device.md'}")
    if bad:
        click.echo(f"cut or failed: {', '.join(bad)}; the same command goes on")
        raise click.exceptions.Exit(1)
