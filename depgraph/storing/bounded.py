"""Work that a stranger's folder asks for, stopped where it goes beyond what such a folder may cost.

What is counted is what the thread itself computes and what the process holds, not the clock: a busy
machine stops nothing. A watching thread raises in the one that works, between two steps of Python;
a single call into C that runs on is not stopped, and is kept small by the bounds on numbers. Where
a system has no clock of one thread (macOS), that of the process counts, and Windows tells no peak.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from depgraph.errors import DepgraphError

MAX_SECONDS = 300.0
"""CPU time; the largest models take less than a minute."""

MAX_BYTES = 8 << 30
"""Growth of the process's peak memory: nothing here has data."""

_EVERY_S, _AGAIN_S = 0.2, 1.0
_T = TypeVar("_T")


class _Exceeded(BaseException):
    """Raised in the working thread; no library's ``except Exception`` keeps it."""


def bounded(work: Callable[[], _T]) -> _T:
    """What some work gives back.

    Raises
    ------
    DepgraphError
        When it takes more than `MAX_SECONDS` of CPU time or `MAX_BYTES` of memory.
    """
    ident, stop = threading.get_ident(), threading.Event()
    thread = threading.Thread(target=_watch, args=(ident, stop), daemon=True)
    try:
        thread.start()
        try:
            return work()
        finally:
            _end(ident, stop, thread)
    except _Exceeded:
        _end(ident, stop, thread)
        raise DepgraphError(
            f"to make the model takes more than {MAX_SECONDS:.0f} s of CPU time or "
            f"{MAX_BYTES >> 30} GiB of memory, which is not what a saved model needs; save it again"
        ) from None


def _end(ident: int, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    thread.join()
    _raise(ident, None)  # what came too late


def _watch(ident: int, stop: threading.Event) -> None:
    start, peak = _seconds(ident), _peak_bytes()
    while not stop.wait(_EVERY_S):
        spent = _seconds(ident) - start
        if spent > MAX_SECONDS or _peak_bytes() - peak > MAX_BYTES:
            _raise(ident, _Exceeded)
            stop.wait(_AGAIN_S)


def _raise(ident: int, error: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(ident), None if error is None else ctypes.py_object(error)
    )


def _seconds(ident: int) -> float:
    if hasattr(time, "pthread_getcpuclockid"):
        return time.clock_gettime(time.pthread_getcpuclockid(ident))
    return time.process_time()


def _peak_bytes() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
