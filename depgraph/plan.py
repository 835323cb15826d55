"""A plan: for each group the units that stay, as plain data that knows every shape it leads to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from depgraph.coupling.axes import Atom, Axis, Concat, kept_indices
from depgraph.errors import DepgraphError

if TYPE_CHECKING:
    from depgraph.graph import DependencyGraph

FORMAT = 1
"""Version of the JSON form."""

Factor = tuple[str, Tensor, float]
"""Name of a parameter, which of its entries (a mask of its shape), and what they are times."""

Spec = str | int | list["Spec"]
"""An axis as plain data: a group's name, a frozen size, or ``["x", ...]`` / ``["++", ...]``."""


@dataclass(frozen=True)
class Plan:
    """What stays of each group, and what that makes of the model.

    Attributes
    ----------
    kept_units : dict of str to tuple of int
        Units kept, ascending, for each group that loses some; a group left out keeps all. There may
        be none: what the group computed is zero then.
    sizes : dict of str to int
        Units that each prunable group has before pruning.
    num_params, macs : int
        Of the sliced model; multiply-accumulates for batch 1.
    axes : dict of str to list of Spec
        What each parameter dimension is made of.
    buffer_axes : dict of str to list of Spec
        The same for buffers.
    inputs : object
        Shapes and dtypes of the example inputs, to trace the model again.
    choices : dict of str to tuple of tuple of int
        Units kept of groups of which each unit of another keeps its own (head dims, by head), one
        row for each of that one. In ``kept_units`` they are then only counted: ``0 .. k - 1``.
    state : dict
        Modes and floating types of the model that was traced, to replay the plan on another one.
    stock_scale : bool
        Attentions that lose head dims get the scale that constructors give to the width that is
        left, and weights make up for it; otherwise a scale that a forward is told stays.
    factors : tuple of (str, BoolTensor, float)
        Only of a plan that a sliced model carries, and of no plan that is read: by what number the
        cut multiplied which entries of a parameter, of the original's shape, to keep the
        temperature of an attention.

    Examples
    --------
    >>> import depgraph, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    >>> plan = depgraph.trace(model, torch.randn(1, 4)).plan({"hidden": [0, 3, 5]})
    >>> plan.kept["0.weight"][0].tolist(), plan.num_params
    ([0, 3, 5], 23)
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    kept_units: dict[str, tuple[int, ...]]
    sizes: dict[str, int]
    num_params: int
    macs: int
    axes: dict[str, list[Spec]] = field(repr=False)
    buffer_axes: dict[str, list[Spec]] = field(repr=False)
    inputs: Any = field(repr=False)
    choices: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict, repr=False)
    stock_scale: bool = False
    factors: tuple[Factor, ...] = field(default=(), repr=False, compare=False)
    _graph: DependencyGraph | None = field(default=None, repr=False, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """A plan does not change: copies of the model that carries it share it."""
        return self

    @cached_property
    def kept(self) -> dict[str, dict[int, Tensor]]:
        """Indices kept of the original parameter, by name and dimension of a prunable group."""
        return self._kept(self.axes)

    @cached_property
    def kept_buffers(self) -> dict[str, dict[int, Tensor]]:
        """Indices kept of the original buffer, by name and dimension of a prunable group."""
        return self._kept(self.buffer_axes)

    def _kept(self, axes: Mapping[str, list[Spec]]) -> dict[str, dict[int, Tensor]]:
        atoms = {name: Atom(size) for name, size in self.sizes.items()}
        kept = {
            atoms[name]: torch.tensor(units, dtype=torch.long)
            for name, units in {**self.kept_units, **self.choices}.items()
        }
        out: dict[str, dict[int, Tensor]] = {}
        for name, specs in axes.items():
            found = {
                dim: kept_indices(_axis(spec, atoms), kept)
                for dim, spec in enumerate(specs)
                if _mentions_group(spec)
            }
            if found:
                out[name] = found
        return out

    def apply(self, model: nn.Module, inplace: bool = False) -> nn.Module:
        """Cut the units that the plan drops out of a model.

        Parameters
        ----------
        model : nn.Module
            The model the plan was made for, by parameter names and shapes.
        inplace : bool
            Change ``model`` itself; by default it stays as it was, and nothing is shared.

        Returns
        -------
        nn.Module
            The smaller model, in the mode of the original.

        Raises
        ------
        DepgraphError
            When the plan is for another model, or when the sliced model does not compute the
            shapes the plan predicts; the model is untouched then, in place or not.

        Notes
        -----
        An attention of d head dims that keeps d' of them keeps its temperature too: what makes its
        queries is multiplied by ``(d' / d) ** 0.5``, rounded once in the parameter's own dtype, by
        6e-8 of its value at most in float32 and by 4e-3 in bfloat16. Where no weights can be
        proven to do so, the module's forward is generated with the old number.
        """
        from depgraph.slicing.slice import (
            apply_plan,  # the slicer needs the graph, which needs plans
        )

        return apply_plan(self, model, inplace)

    def standard(self, model: nn.Module | None = None) -> dict[str, Any] | None:
        """What a stock library has to be told to build the pruned model itself.

        Parameters
        ----------
        model : nn.Module, optional
            The model that the plan was made for, or what it made of it; not changed. Only a plan
            that was read, or that a pruned model carries, does not know it.

        Returns
        -------
        dict or None
            ``{"library": "timm", "name": name, "arguments": {argument: value}}``, for
            ``"transformers"`` the name of a class and the entries of its configuration. What it
            builds takes the state dict of the pruned model strictly and computes the same. None
            where no arguments are known to build it.

        Raises
        ------
        DepgraphError
            When the plan does not know the model.

        Notes
        -----
        Proposed by the number of units that groups of a kind have left in common; proven by
        building it without data, and comparing names, shapes, classes, attributes and every op of
        a trace in both modes with those of the pruned model.

        Head dims: transformers is told ``head_dim``, also where the class's own configuration does
        not have it (ViT, DeiT, BEiT, DINOv2); the plan must have ``stock_scale`` then. The vision
        transformers of timm are told ``embed_dim`` and ``num_heads`` alone: their head dims can be
        cut only to the quotient. Those of queries and keys with rotary positions (Llama) stay
        whole, as a constructor makes the frequencies from their number.
        A parameter that the traced forward does not read (the ``mask_token`` of DINOv2) is not cut,
        and the embedding must stay whole for it: build the model without
        (``use_mask_token=False``), or trace with an input that uses it.
        """
        from depgraph.storing.standard import standard_of  # which applies plans

        return standard_of(self, model)

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "format": FORMAT,
            "kept_units": self.kept_units,
            "sizes": self.sizes,
            "num_params": self.num_params,
            "macs": self.macs,
            "inputs": self.inputs,
            "choices": self.choices,
            "state": self.state,
            "stock_scale": self.stock_scale,
            "axes": self.axes,
            "buffer_axes": self.buffer_axes,
        }

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from the text that `to_json` wrote.

        Parameters
        ----------
        text : str
            Or ``plan.json`` of a folder that `depgraph.save` wrote: then the last plan in it.

        Returns
        -------
        Plan

        Raises
        ------
        DepgraphError
            When the text is no plan of this format.
        """
        try:
            data = json.loads(text)
            if "plans" in data:
                data = data["plans"][-1]
            return cls.from_dict(data)
        except (*_NO_PLAN, ValueError) as error:
            if isinstance(error, DepgraphError):
                raise
            raise DepgraphError(
                f"this is no plan ({type(error).__name__}: {str(error)[:200]}); "
                "write one with plan.to_json()"
            ) from error

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """A plan from the plain data that `to_dict` made.

        Raises
        ------
        DepgraphError
            When it is no plan of this format.
        """
        try:
            if data["format"] != FORMAT:
                found = str(data["format"])[:20]
                raise DepgraphError(
                    f"the plan has format {found!r}; this version reads format {FORMAT}"
                )
            if data.get("separate"):
                raise DepgraphError(
                    "the plan lets v lose other head dims than q and k, which this version cannot "
                    "cut; make a plan anew"
                )
            plan = cls(
                {str(name): _integers(units) for name, units in data["kept_units"].items()},
                {str(name): int(size) for name, size in data["sizes"].items()},
                int(data["num_params"]),
                int(data["macs"]),
                data["axes"],
                data["buffer_axes"],
                data["inputs"],
                {
                    str(name): tuple(map(_integers, rows))
                    for name, rows in data.get("choices", {}).items()
                },
                dict(data.get("state", {})),
                data.get("stock_scale", False) is True,
            )
        except (*_NO_PLAN, ValueError) as error:
            if isinstance(error, DepgraphError):
                raise
            raise DepgraphError(
                f"this is no plan ({type(error).__name__}: {str(error)[:200]}); "
                "write one with plan.to_json()"
            ) from error
        for name, units in plan.kept_units.items():
            if name not in plan.sizes:
                raise DepgraphError(f"the plan keeps units of '{name}' but does not say its size")
            check_units(name, plan.sizes[name], units)
            for row in plan.choices.get(name, ()):
                if len(check_units(name, plan.sizes[name], row)) != len(units):
                    raise DepgraphError(
                        f"group '{name}': a row of the plan's choices has other than {len(units)} "
                        "units"
                    )
        return plan


_NO_PLAN = (KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading a plan raises for other JSON, beside ValueError."""


def _integers(units: Any) -> tuple[int, ...]:
    """A list of JSON as indices; ``0.5`` and ``"12"`` are none, though `int` would take them."""
    if not isinstance(units, list) or any(type(unit) is not int for unit in units):
        raise TypeError(f"{units!r} is no list of integers")
    return tuple(units)


def check_units(name: str, size: int, units: Sequence[int] | Tensor) -> tuple[int, ...]:
    """The units to keep of a group, ascending.

    Parameters
    ----------
    name : str
        The group, for the message.
    size : int
        Its units are ``0 .. size - 1``.
    units : sequence of int, or Tensor
        Units to keep, in any order.

    Returns
    -------
    tuple of int

    Raises
    ------
    DepgraphError
        When one is out of range, repeated, or no integer.
    """
    if isinstance(units, Tensor) and units.numel():
        if units.dtype.is_floating_point or units.dtype == torch.bool or units.dim() != 1:
            raise DepgraphError(
                f"group '{name}': kept units must be a 1-d tensor of integers, "
                f"got {units.dtype} of shape {tuple(units.shape)}; use mask.nonzero().flatten()"
            )
        units = units.tolist()
    values = list(units)
    wrong = [u for u in values if isinstance(u, bool) or not hasattr(u, "__index__")]
    if wrong:
        raise DepgraphError(f"group '{name}': kept units must be integers, got {wrong[0]!r}")
    numbers = sorted(u.__index__() for u in values)
    if not numbers:
        return ()
    if numbers[0] < 0 or numbers[-1] >= size:
        bad = numbers[0] if numbers[0] < 0 else numbers[-1]
        raise DepgraphError(f"group '{name}': unit {bad} is not in 0..{size - 1}")
    if len(set(numbers)) != len(numbers):
        twice = next(a for a, b in pairwise(numbers) if a == b)
        raise DepgraphError(f"group '{name}': unit {twice} is kept twice; name each unit once")
    return tuple(numbers)


def axis_spec(axis: Axis, names: Mapping[Atom, str]) -> Spec:
    """An axis as plain data; atoms without a name are frozen and appear by their size."""
    specs: list[Spec] = []
    for factor in axis:
        if isinstance(factor, Concat):
            specs.append(["++", *(axis_spec(part, names) for part in factor.parts)])
        else:
            specs.append(names.get(factor, factor.size))
    if not specs:
        return 1
    return specs[0] if len(specs) == 1 else ["x", *specs]


def _axis(spec: Spec, atoms: Mapping[str, Atom]) -> Axis:
    if isinstance(spec, int):
        return (Atom(spec, "frozen"),) if spec > 1 else ()
    if isinstance(spec, str):
        return (atoms[spec],)
    head, *rest = spec
    if head == "x":
        return tuple(factor for item in rest for factor in _axis(item, atoms))
    return (Concat(tuple(_axis(item, atoms) for item in rest)),)


def _mentions_group(spec: Spec) -> bool:
    if isinstance(spec, list):
        return any(_mentions_group(item) for item in spec[1:])
    return isinstance(spec, str)
