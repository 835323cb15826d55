"""``plan.json``: how a saved model is made again, as plain data that may come from a stranger."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from depgraph.errors import DepgraphError
from depgraph.plan import Plan
from depgraph.storing.arguments import MAX_INTEGER
from depgraph.storing.reading import read_json
from depgraph.storing.recipe import Recipe, check
from depgraph.tracing.inputs import State

FORMAT = 2
"""Version of the folder's layout; 1 had the structure of the model in ``structure.json``."""

NAME, BEFORE = "plan.json", "structure.json"


@dataclass(frozen=True)
class Manifest:
    """What a folder says of the model in it, beside the tensors.

    Attributes
    ----------
    cls : str
        Name of the model's class, for messages alone.
    recipe : dict or None
        How the dense model is made.
    why : str
        Why there is no recipe.
    plans : tuple of Plan
        In the order in which they were applied.
    classes : tuple of int
        Outputs of the classifier when each plan was applied, and now; empty where it is not known.
    ties : tuple of tuple of str
        Names that are one tensor, the first of which it is stored by.
    state : dict
        Modes of the modules.
    frozen : tuple of str
        Parameters without a gradient.
    facts, ops : dict of str to str
        Digests to compare a model with, see `depgraph.storing.outline`.
    key : str
        What the process that saved a model without a recipe remembers it by.
    versions : dict of str to str
        Of the packages that made it.
    checksums : dict of str to str
        CRC-32 of each file of tensors.
    """

    cls: str
    recipe: Recipe | None
    why: str
    plans: tuple[Plan, ...]
    classes: tuple[int, ...]
    ties: tuple[tuple[str, ...], ...]
    state: State
    frozen: tuple[str, ...]
    facts: dict[str, str] = field(default_factory=dict)
    ops: dict[str, str] = field(default_factory=dict)
    key: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)

    @property
    def limit(self) -> int:
        """Most modules and parameters that the dense model may have, by what the folder holds."""
        named = sum(len(plan.axes) + len(plan.buffer_axes) for plan in self.plans)
        return 20_000 + 50 * named

    def to_json(self) -> str:
        """The text of ``plan.json``."""
        data = {"format": FORMAT, **{f.name: getattr(self, f.name) for f in fields(self)}}
        data["plans"] = [plan.to_dict() for plan in self.plans]
        return json.dumps(data, allow_nan=False)


def read_manifest(directory: Path) -> Manifest:
    """What a folder's ``plan.json`` says.

    Raises
    ------
    DepgraphError
        When there is none, or it is damaged or of another format.
    """
    if not (directory / NAME).exists() and not (directory / BEFORE).exists():
        raise DepgraphError(f"'{directory}' is no saved model; save one with depgraph.save")
    data = {} if (directory / BEFORE).exists() else read_json(directory, NAME)
    found = data.pop("format", 1)
    if found == 1:
        raise DepgraphError(
            f"'{directory}' was saved by an earlier version, in a form that named classes and "
            "functions; load it with that version, and save the model again with this one"
        )
    if found != FORMAT:
        raise DepgraphError(
            f"'{directory}' has format {str(found)[:20]}; this version reads {FORMAT}"
        )
    try:
        return _checked(data)
    except DepgraphError as error:
        raise DepgraphError(f"'{directory / NAME}' is damaged: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        text = f"{type(error).__name__}: {str(error)[:200]}"
        raise DepgraphError(
            f"'{directory / NAME}' is damaged: {text}; save the model again"
        ) from error


def _checked(data: dict[str, Any]) -> Manifest:
    if data["recipe"] is not None:
        check(data["recipe"])
    counts = _list_of(data["classes"], int)
    plans = tuple(map(Plan.from_dict, _list_of(data["plans"], dict)))
    if any(not 0 <= n <= MAX_INTEGER for n in counts) or len(counts) not in (0, len(plans) + 1):
        raise ValueError(f"{counts!r} are no numbers of classes")
    for plan in plans:
        _check_state(plan.state)
        for size in plan.sizes.values():
            if not 0 < size <= MAX_INTEGER:
                raise ValueError(f"no group has {size} units")
        if not isinstance(plan.axes, dict) or not isinstance(plan.buffer_axes, dict):
            raise TypeError("axes are named")
    _check_state(data["state"])
    cls = _word(data["cls"])
    if not cls.isidentifier():  # messages spell code with it
        raise ValueError(f"{cls[:60]!r} is no name of a class")
    return Manifest(
        cls=cls,
        recipe=data["recipe"],
        why=_word(data["why"]),
        plans=plans,
        classes=counts,
        ties=tuple(_list_of(names, str) for names in _list_of(data["ties"], list)),
        state=data["state"],
        frozen=_list_of(data["frozen"], str),
        facts=_texts(data["facts"]),
        ops=_texts(data["ops"]),
        key=_word(data["key"]),
        versions=_texts(data["versions"]),
        checksums=_texts(data["checksums"]),
    )


def _check_state(state: Any) -> None:
    if type(state["training"]) is not bool:
        raise TypeError("a mode is true or false")
    _list_of(state["others"], str)
    for names in state["dtypes"].values():
        _list_of(names, str)


def _list_of(value: Any, kind: type) -> tuple[Any, ...]:
    if not isinstance(value, list) or any(type(item) is not kind for item in value):
        raise TypeError(f"{str(value)[:60]!r} is no list of {kind.__name__}")
    return tuple(value)


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:60]!r} is no text")
    return value[:500]


def _texts(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise TypeError(f"{str(value)[:60]!r} are no digests")
    return value
