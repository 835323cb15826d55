"""Which line of the user's code is running."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType

import torch

_TYPED_IN = ("<stdin>", "<string>", "<console>", "<ipython-input", "<python-input")
_PLACES = (Path(torch.__file__).resolve().parent, Path(__file__).resolve().parents[1])
_OURS = tuple(f"{place}{os.sep}" for place in _PLACES)


def source_line() -> str:
    """``"file.py, line 7"`` of the innermost code that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_foreign(frame):
            return place(frame, frame.f_lineno)
        frame = frame.f_back
    return ""


def source_stack(below: FrameType | None = None) -> tuple[str, ...]:
    """Every line of such code that is running below a frame, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    found = []
    while frame is not None and frame is not below:
        if is_foreign(frame):
            found.append(f"{frame.f_code.co_filename}, line {frame.f_lineno}")
        frame = frame.f_back
    return tuple(found)


def is_foreign(frame: FrameType) -> bool:
    """Whether a frame runs code that is neither torch's nor ours, nor generated."""
    file = frame.f_code.co_filename
    known = _foreign.get(file)
    if known is None:
        made = file[:1] == "<" and not file.startswith(_TYPED_IN)
        known = _foreign[file] = not (made or file.startswith(_OURS))
    return known


_foreign: dict[str, bool] = {}


def place(frame: FrameType, line: int) -> str:
    """A line of a frame's file, for people."""
    return f"{frame.f_code.co_filename.rpartition(os.sep)[2]}, line {line}"
