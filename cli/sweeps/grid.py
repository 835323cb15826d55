"""The file of a sweep: which runs it asks for, and what each is called."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.options.said import BUDGETS
from cli.running.settings import CONTROLS
from cli.sweeps.options import is_list, run_options
from depgraph import DepgraphError
from pruners import METRICS
from pruners.choosing.choices import check_choice

_PLURALS = {
    "models": "model",
    "metrics": "metric",
    "ratios": "ratio",
    "targets": "target",
    "seeds": "seed",
}
_OWN = ("model", "data", "out", "digits_per_class", "controls", "keep_models", "ray")
_FREE = ("device", "bench_seconds")
"""Options that may change between calls: a finished run stays finished."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes
    ----------
    name : str
        Of its directory; ends with a digest of all that decides the result.
    label : str
        How the model is called in results.
    options : dict
        Options of `run` by name, those that are said.
    control : str, optional
        One of `CONTROLS` in place of a cut by a metric.
    """

    name: str
    label: str
    options: dict[str, Any]
    control: str | None = None


@dataclass(frozen=True)
class Grid:
    """What the file of a sweep says.

    Attributes
    ----------
    data : str
        A folder, or ``"digits"``.
    out : str, optional
    digits_per_class : int, optional
        Only so many digits of each class.
    models : tuple of dict
        Options of `run` for each model, and its ``label``.
    axes : dict of str to tuple
        Values of every other option; budgets are under ``"budget"``, as (name, share) pairs.
    controls : tuple of str
    keep_models : bool
        Whether runs keep their pruned models, or their results alone.
    ray : dict
        Resources of one run, as of Ray's ``.options()``: ``num_cpus``, ``num_gpus``.
    """

    data: str
    out: str | None
    digits_per_class: int | None
    models: tuple[dict[str, Any], ...]
    axes: dict[str, tuple[Any, ...]]
    controls: tuple[str, ...] = ()
    keep_models: bool = False
    ray: dict[str, float] = field(default_factory=dict)

    def cells(self, domains: Sequence[str]) -> list[Cell]:
        """All runs, those of one seed together; every domain is a target where none is named."""
        axes = dict(self.axes)
        targets, seeds = axes.pop("target", tuple(domains)), axes.pop("seed", (0,))
        budgets, metrics = axes.pop("budget", (("ratio", 0.5),)), axes.pop("metric", (None,))
        cuts: list[tuple[Any, Any, str | None]] = [
            *((b, m, None) for b in budgets for m in metrics),
            *((b, None, c) for c in self.controls for b in (budgets if c != "dense" else [None])),
        ]
        found: dict[str, Cell] = {}
        for seed, model, target in itertools.product(seeds, self.models, targets):
            for values in itertools.product(*axes.values()):
                several = {n: v for n, v in zip(axes, values, strict=True) if len(axes[n]) > 1}
                for budget, metric, control in cuts:
                    options = dict(zip(axes, values, strict=True)) | model
                    options |= {"target": target, "seed": seed}
                    options |= {} if metric is None else {"metric": metric}
                    options |= {} if budget is None else {budget[0]: budget[1]}
                    cell = _cell(options, several, control)
                    found[cell.name] = cell
        return list(found.values())


def _cell(options: dict[str, Any], several: Mapping[str, Any], control: str | None) -> Cell:
    options = dict(options)
    label = options.pop("label", None) or options["model_name"]
    said = {name: value for name, value in options.items() if name not in _FREE}
    text = json.dumps([said, control], sort_keys=True)
    budget = next((f"{name}={options[name]:g}" for name in BUDGETS if name in options), None)
    parts = [
        Path(label).name,
        control or options.get("metric", "best"),
        budget,
        *(f"{name}={value}" for name, value in several.items()),
        options["target"],
        f"seed{options['seed']}",
        hashlib.sha256(text.encode()).hexdigest()[:8],
    ]
    name = "-".join(re.sub(r"[^\w.=]+", "_", str(part)) for part in parts if part is not None)
    return Cell(name, label, options, control)


def read_grid(path: Path) -> Grid:
    """Read the file of a sweep.

    Raises
    ------
    DepgraphError
        For a file that is no TOML, a key that is unknown (near ones are offered) or missing, and
        values of a wrong kind.
    """
    try:
        text = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DepgraphError(f"'{path}' is no TOML: {error}") from error
    said: dict[str, Any] = {}
    for key, value in text.items():
        name = _PLURALS.get(key, key)
        check_choice(f"key in '{path}':", key, [*_PLURALS, *_OWN, *_axis_names()])
        if name in said:
            raise DepgraphError(f"'{path}' says {name} twice, in the singular and plural; keep one")
        said[name] = value
    for name in ("data", "model"):
        if name not in said:
            raise DepgraphError(f"'{path}' names no {name}; add {name} = ...")
    controls = tuple(_listed(said.get("controls", [])))
    for control in controls:
        check_choice("control", control, CONTROLS)
    models = tuple(_model(path, entry) for entry in _listed(said["model"]))
    if not models or not said["data"]:
        empty = "data" if models else "models"
        raise DepgraphError(f"'{path}': {empty} is empty; say which")
    per_class = _typed(path, said, "digits_per_class", int)
    if per_class is not None and said["data"] != "digits":
        raise DepgraphError(f"'{path}' says digits_per_class, but its data are no digits")
    return Grid(
        data=str(_typed(path, said, "data", str)),
        out=_typed(path, said, "out", str),
        digits_per_class=per_class,
        models=models,
        axes=dict(_axes(path, said)),
        controls=controls,
        keep_models=bool(_typed(path, said, "keep_models", bool)),
        ray=_resources(path, said),
    )


def _axis_names() -> list[str]:
    return [name for name in run_options() if name not in ("model_name", "model_args")]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _typed(path: Path, said: Mapping[str, Any], name: str, kind: type) -> Any:
    value = said.get(name)
    if value is not None and not isinstance(value, kind):
        raise DepgraphError(f"'{path}': {name} is {value!r}; it must be a {kind.__name__}")
    return value


def _resources(path: Path, said: Mapping[str, Any]) -> dict[str, float]:
    resources: dict[str, Any] = _typed(path, said, "ray", dict) or {}
    for name, amount in resources.items():
        _check_number(path, f"{name} of ray", amount)
    return resources


def _check_number(path: Path, name: str, value: Any) -> None:
    if not isinstance(value, int | float):
        raise DepgraphError(f"'{path}': {name} is {value!r}; it must be a number")


def _plain(path: Path, name: str, value: Any) -> None:
    """Refuse what no option takes: TOML has dates and times."""
    parts = value.values() if isinstance(value, dict) else value
    for part in parts:
        if isinstance(part, list | tuple | dict):
            _plain(path, name, part)
        elif not isinstance(part, str | int | float):
            raise DepgraphError(f"'{path}': {name} has {part}; it must be a number or a text")


def _model(path: Path, entry: Any) -> dict[str, Any]:
    options = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(options, dict) or not isinstance(options.get("name"), str):
        raise DepgraphError(f"'{path}': a model is a name, or a table with a name, not {entry!r}")
    if not isinstance(options.get("label", ""), str):
        raise DepgraphError(f"'{path}': the label {options['label']!r} of a model is no text")
    _plain(path, f"model '{options['name']}'", options)
    known = [name for name in run_options() if name not in ("model_name", "target", "seed")]
    for key in options:
        check_choice(
            f"key of model '{options['name']}' in '{path}':", key, ["name", "label", *known]
        )
    return {"model_name" if key == "name" else key: value for key, value in options.items()}


def _axes(path: Path, said: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    budgets: list[tuple[str, float]] = []
    for name, value in said.items():
        if name in _OWN:
            continue
        one = not isinstance(value, list) or (
            is_list(name) and not any(isinstance(item, list) for item in value)
        )
        values = (value,) if one else tuple(value)
        _plain(path, name, values)
        if name == "metric" and values == ("all",):
            values = tuple(METRICS)
        if not values:
            raise DepgraphError(f"'{path}': {name} is an empty list; leave it out")
        if name in BUDGETS:
            for share in values:
                _check_number(path, name, share)
            budgets += [(name, share) for share in values]
        else:
            yield name, values
    if budgets:
        yield "budget", tuple(budgets)
