"""Records of finished stages: ``<stage>.json`` with the settings that the stage was made with.

A stage that has one is taken as it is, and refused where it was made otherwise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli.output import write_json
from cli.running.saved import read_record
from depgraph import DepgraphError
from domains.running import processes


def stage_record(
    path: Path,
    made_with: dict[str, Any],
    make: Callable[[], dict[str, Any]],
    *,
    together: bool = True,
    begin: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The record of a stage: read when it is finished, made otherwise.

    Parameters
    ----------
    path : Path
        ``<directory>/<stage>.json``.
    made_with : dict
        All that decides the stage, as plain data.
    make : callable
        Does the stage, and gives what is to be recorded.
    together : bool
        Of several processes, whether all make it, or the main one alone.
    begin : callable
        Called before it is made.

    Raises
    ------
    DepgraphError
        When it is finished and was made with something else.
    """
    made_with = json.loads(json.dumps(made_with))
    processes.wait()  # what was written before is there for all
    if path.exists():
        record = _read(path)
        if record["made_with"] != made_with:
            raise DepgraphError(
                f"stage '{path.stem}' in '{path.parent}' was made with "
                f"{_difference(record['made_with'], made_with)}; choose another --out"
            )
        return record
    begin()
    start = time.perf_counter()
    if together or processes.is_main():
        record = {**make(), "made_with": made_with}
        write_json(path, {**record, "seconds": time.perf_counter() - start})
    processes.wait()
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    record = read_record(path)
    if not isinstance(record.get("made_with"), dict):
        raise DepgraphError(f"'{path}' is no record of a stage; choose another --out")
    return record


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first setting that is not the same, as ``name=old, not new``."""
    for name in {**now, **before}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            return f"{name}: {_difference(old, new)}"
        if old != new:
            return f"{name}={old!r}, not {new!r}"
    return "the same"
