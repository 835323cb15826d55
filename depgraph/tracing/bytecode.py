"""What the code of a forward tells of how it treats sizes, without running it.

Instructions differ between versions of Python: they are read in one form, that of 3.11, in which
each of them does one thing.
"""

from __future__ import annotations

import dis
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from types import CodeType
from typing import Any


@dataclass(frozen=True)
class Step:
    """One instruction.

    Attributes
    ----------
    name : str
        Of Python 3.11's.
    argument : object
    offset : int
        In the code.
    """

    name: str
    argument: Any
    offset: int


_NO_STEPS = frozenset(("CACHE", "PRECALL", "EXTENDED_ARG", "NOP", "NOT_TAKEN", "TO_BOOL"))
_OF_NAMES = re.compile("(?:LOAD|STORE)_(?:FAST|DEREF)")


@cache
def steps_of(code: CodeType) -> tuple[Step, ...]:
    """The instructions of some code that do something."""
    return tuple(
        step
        for instruction in dis.get_instructions(code)
        if instruction.opname not in _NO_STEPS
        for step in _parts(instruction)
    )


def _parts(instruction: dis.Instruction) -> Iterator[Step]:
    """An instruction, or the two that it stands for."""
    name, argument, offset = instruction.opname, instruction.argval, instruction.offset
    if name == "BINARY_OP" and instruction.argrepr == "[]":
        name = "BINARY_SUBSCR"
    elif name == "LOAD_SMALL_INT":
        name = "LOAD_CONST"
    names = _OF_NAMES.findall(name) or [name]
    arguments = argument if len(names) > 1 else (argument,)
    for one, of_one in zip(names, arguments, strict=True):
        yield Step(one, of_one, offset)


_EVERYWHERE = 3
"""Numbers up to this one, and minus one, are in most code: dimensions, channels, heads."""


@cache
def numbers_near(code: CodeType) -> frozenset[int]:
    """Larger integers that are written in some code, and their neighbours.

    Three and more in a row are an order of dimensions, and so is a tuple that nothing is looked
    for in.
    """
    found: set[int] = set()
    for is_constant, group in groupby(steps_of(code), lambda step: step.name == "LOAD_CONST"):
        row = [step.argument for step in group] if is_constant else []
        found.update(x for x in row if type(x) is int and len(row) < 3)
    for step, after in pairwise(steps_of(code)):
        if after.name == "CONTAINS_OP" and isinstance(step.argument, (tuple, frozenset)):
            found.update(x for x in step.argument if type(x) is int)
    large = {abs(x) for x in found if abs(x) > _EVERYWHERE}
    return frozenset(x + step for x in large for step in (-1, 0, 1))


_UNASKED = frozenset(
    ("range", "numpy", "np", "gcd", "lcm", "comb", "perm", "isqrt", "factorial", "bytes", "islice")
)
"""Names in code that takes a size for a number without asking, or for a number of times."""

_PLACES = ("LOAD_FAST", "LOAD_DEREF", "BINARY_OP", "UNARY_NEGATIVE", "BINARY_SUBSCR")
_SIZES = frozenset(("size", "len", "numel"))


@cache
def may_hide(code: CodeType) -> bool:
    """Whether some code may decide by a size, or by how many there are, without asking.

    It takes it to one of these, or for a place in what may be a list; or it goes on after an error.
    """
    steps = steps_of(code)
    counted = _loop_names(steps)
    names = ["" if step.argument in counted else step.name for step in steps]
    return (
        not _UNASKED.isdisjoint(code.co_names)
        or {"shape", "numel"} <= {*code.co_names}  # a torch.Size multiplies itself
        or "CHECK_EXC_MATCH" in names
        or any(
            _is_computed(names[:i]) or _is_size(steps[:i])
            for i, name in enumerate(names)
            if name == "BINARY_SUBSCR"
        )
        or any(
            name == "BINARY_SLICE" and set(names[i - 2 : i]) != {"LOAD_CONST"}
            for i, name in enumerate(names)
        )
    )


def _is_computed(names: list[str]) -> bool:
    """Whether the last of these steps leaves a place that is no constant, for one dimension."""
    if names[-1] == "BUILD_SLICE":
        return set(names[-3:-1]) != {"LOAD_CONST"}
    return names[-1] in _PLACES


def _is_size(steps: tuple[Step, ...]) -> bool:
    """Whether the last of these steps is a call that gives a size."""
    given = [step.argument for step in steps[-6:] if isinstance(step.argument, str)]
    return steps[-1].name == "CALL" and not _SIZES.isdisjoint(given)


def _loop_names(steps: tuple[Step, ...]) -> list[Any]:
    """Names that loops give values to."""
    return [
        stored.argument
        for i, step in enumerate(steps)
        if step.name == "FOR_ITER"
        for stored in steps[i + 1 : i + 4]
        if stored.name == "STORE_FAST"
    ]


def comes_apart(code: CodeType, offset: int) -> bool:
    """Whether the parts that a call gives are as many as there are names for them."""
    steps = steps_of(code)
    at = next(i for i, step in enumerate(steps) if step.offset >= offset)
    names = [step.name for step in steps[at : at + 3]]
    return "UNPACK_SEQUENCE" in names[:2] or names[1:] == ["LOAD_CONST", "BINARY_SUBSCR"]


@cache
def checks_in(code: CodeType) -> frozenset[int]:
    """Offsets of comparisons after which one way leads straight to an error."""
    steps = steps_of(code)
    at = {step.offset: i for i, step in reversed(list(enumerate(steps)))}
    found = set()
    for i, (step, jump) in enumerate(pairwise(steps)):
        if step.name == "COMPARE_OP" and jump.name.startswith("POP_JUMP"):
            ways = (i + 2, at.get(jump.argument, i + 2))
            if any(_raises(steps, way) for way in ways):
                found.add(step.offset)
    return frozenset(found)


def _raises(steps: tuple[Step, ...], start: int) -> bool:
    for step in steps[start:]:
        if step.name == "RAISE_VARARGS":
            return True
        if "JUMP" in step.name or "RETURN" in step.name or step.name == "FOR_ITER":
            return False
    return False
