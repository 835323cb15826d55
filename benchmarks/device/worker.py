"""A step in a process of its own, with a limit: what it does to a GPU or to memory ends with it.

On a fork nothing has to be imported again; this process never touches the GPU, so that its forks
can. Should they find that they cannot, the command starts fresh processes instead.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.device.record import CUT, FAILED, Record
from benchmarks.device.settings import Settings
from benchmarks.device.steps import BY_NAME
from cli.options.failures import FAILURES, sentence

SOFT = 0.85
"""Part of the limit after which a step begins no row."""


class Stopped(BaseException):
    """SIGTERM was sent to the command."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that what runs is ended and the page is made."""

    def stop(*_: Any) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_step(
    name: str, settings: Settings, identity: dict[str, Any], limit: float, method: str
) -> Record:
    """Run a step to its end or its limit.

    Parameters
    ----------
    name : str
    settings : Settings
    identity : dict
        Of its record.
    limit : float
        Seconds.
    method : str
        How the process starts: ``"fork"`` or ``"spawn"``.

    Returns
    -------
    Record
        In its final state, in its file.
    """
    path = settings.out / f"{name}.json"
    start = time.monotonic()
    before = Record(path, identity).data["seconds"]
    process = multiprocessing.get_context(method).Process(  # type: ignore[attr-defined]
        target=_child, args=(name, settings, identity, limit * SOFT)
    )
    process.start()
    try:
        ended = bool(wait([process.sentinel], timeout=limit))
    finally:
        _end(process)
        record = Record(path, identity)
        record.data["seconds"] = before + time.monotonic() - start
        if record.data.get("running"):  # it did not say how it ended
            doing = f" at '{record.data['doing']}'" if record.data.get("doing") else ""
            record.data |= {"state": CUT, "reason": f"interrupted{doing}", "running": False}
        record.save()
    if not ended:
        record.save(state=CUT, reason=record.data["reason"].replace(
            "interrupted", f"ended at its limit of {limit:.0f} s"))  # fmt: skip
    elif process.exitcode:
        ways = f"its process ended with code {process.exitcode}"
        if record.state != FAILED:
            record.save(state=FAILED, reason=f"{record.data['reason']}: {ways}")
    return record


def _end(process: Any) -> None:
    """End the process and what it has started: they are one group."""
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it had no time yet to become a group
            process.kill()
    process.join()


def _child(name: str, settings: Settings, identity: dict[str, Any], seconds: float) -> None:
    os.setpgrp()
    for which in (signal.SIGTERM, signal.SIGINT):
        signal.signal(which, signal.SIG_DFL)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _log_to(settings.out / "logs" / f"{name}.txt")
    record = Record(settings.out / f"{name}.json", identity)
    record.deadline = time.monotonic() + seconds
    record.save(running=True, reason="")
    code = 0
    try:
        if settings.cuda:
            torch.cuda.set_device(settings.device)
            torch.set_float32_matmul_precision("high")  # TF32
        BY_NAME[name].run(record, settings)
        record.data["running"] = False
        record.finish()
    except (*FAILURES, ImportError) as error:
        traceback.print_exc()
        reason = sentence(error).removesuffix(" (--debug shows where)")
        record.save(state=FAILED, reason=reason, running=False)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what libraries left open does not keep it


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
