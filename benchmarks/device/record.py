"""What a step measured, in a JSON file that is written anew after each row."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.runtimes import NotHere
from cli.options.failures import FAILURES, sentence
from cli.output import note, write_json

FORMAT = 1

DONE, CUT, FAILED, NOT_HERE = "done", "cut", "failed", "not here"
"""States of a step: finished; to be gone on with; to be tried again; not to be had, and why."""

Row = dict[str, Any]


class Record:
    """The file of one step.

    Parameters
    ----------
    path : Path
    identity : dict
        All that decides what the step measures. What a file of another identity holds is dropped.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.deadline = float("inf")
        found = read(path)
        self.data: dict[str, Any] = {"format": FORMAT, "identity": identity, "state": CUT}
        self.data |= {"reason": "", "facts": {}, "rows": {}, "seconds": 0.0}
        if found.get("format") == FORMAT and found.get("identity") == identity:
            self.data = found

    @property
    def state(self) -> str:
        """One of `DONE`, `CUT`, `FAILED` and `NOT_HERE`."""
        return str(self.data["state"])

    @property
    def facts(self) -> dict[str, Any]:
        """What is no row."""
        found: dict[str, Any] = self.data["facts"]
        return found

    @property
    def rows(self) -> dict[str, Row]:
        """By key, in the order that they were measured in."""
        found: dict[str, Row] = self.data["rows"]
        return found

    def save(self, **changes: Any) -> None:
        """Write the file, whole or not at all."""
        self.data |= changes
        write_json(self.path, self.data)

    def attempt(self, key: str, work: Callable[[], Row]) -> None:
        """Measure a row, unless it is there or time is up; what failed is a row with the reason.

        Parameters
        ----------
        key : str
        work : callable

        Raises
        ------
        RuntimeError
            When the GPU no longer answers after a failure.
        """
        row = self.rows.get(key)
        if row is not None and "failed" not in row:
            return
        if time.monotonic() > self.deadline:
            self.data.setdefault("left", []).append(key)
            return
        note(f"{key} ...")
        self.save(doing=key)
        start = time.monotonic()
        try:
            row = work()
        except NotHere as reason:
            row = {"not_here": str(reason)}
        except FAILURES as error:
            note(traceback.format_exc())
            row = {"failed": sentence(error).removesuffix(" (--debug shows where)")}
        self.rows[key] = {**row, "took": time.monotonic() - start}
        self.save(doing=None)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # raises where the failure took the whole context with it
            torch.cuda.empty_cache()

    def finish(self) -> None:
        """Say that the step is done, or what of it is left."""
        left = self.data.pop("left", [])
        if left:
            first = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
            self.save(state=CUT, reason=f"time was up before {len(left)} rows: {first}")
        else:
            failed = sum("failed" in row for row in self.rows.values())
            self.save(state=DONE, reason=f"rows that failed: {failed}" if failed else "")


def read(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is none, or it is not ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
