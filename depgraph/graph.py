"""The dependency graph of a model: its groups, what a choice of units costs, and plans."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn

from depgraph.costing.cost import total_params
from depgraph.costing.dead import Dead, find_dead_in_modes
from depgraph.costing.macs import Macs
from depgraph.coupling import rules  # noqa: F401  (registers the rules)
from depgraph.coupling.aligned import Aligned, aligned_axes, multiples, unaligned
from depgraph.coupling.alongside import walk
from depgraph.coupling.axes import Atom, axis_atoms
from depgraph.coupling.empty import needs_a_unit
from depgraph.coupling.groups import Group, find_groups
from depgraph.coupling.leads import check_rows, find_leads, has_rows
from depgraph.coupling.propagate import Propagation
from depgraph.errors import DepgraphError
from depgraph.plan import Plan, axis_spec, check_units
from depgraph.tracing.collection import collection_paused
from depgraph.tracing.inputs import input_spec, trace_state
from depgraph.tracing.trace import Trace
from depgraph.viewing.graphml import build_networkx, write_graphml


class DependencyGraph:
    """Which parameter dimensions of a model must shrink together.

    Made by `trace`; holds structure only, no weights.

    Attributes
    ----------
    groups : tuple of Group
        Prunable and frozen ones.
    num_params, macs : int
        Of the model as traced; multiply-accumulates for batch 1.
    in_modes : tuple of Propagation
        The walk over the traced forward, and over those in the other mode and at other calls where
        they may differ.
    origin : nn.Module or None
        The model without data, where a stock library may have made it; for `Plan.standard`.
    """

    @collection_paused()
    def __init__(
        self, traced: Trace, others: Sequence[Trace] = (), branches: Sequence[Trace] = ()
    ) -> None:
        self.traced = traced
        self.origin: nn.Module | None = None
        self.in_modes, self._aside = walk(traced, others, branches)
        self.propagation = self.in_modes[0]
        self.groups: tuple[Group, ...] = find_groups(self.propagation)
        self._dead: dict[frozenset[Atom], dict[Propagation, Dead]] = {}
        self._by_name = {group.name: group for group in self.groups}
        self._macs = Macs(self.propagation)
        self.num_params, self.macs = self.cost({})

    def __repr__(self) -> str:
        return f"<DependencyGraph: {len(self.prunable)} prunable of {len(self.groups)} groups>"

    @cached_property
    def prunable(self) -> tuple[Group, ...]:
        """The groups that are not frozen."""
        return tuple(group for group in self.groups if group.frozen is None)

    def group(self, name: str) -> Group:
        """The group of that name.

        Parameters
        ----------
        name : str

        Returns
        -------
        Group

        Raises
        ------
        DepgraphError
            When there is none; the message offers near names.
        """
        if name not in self._by_name:
            near = difflib.get_close_matches(name, self._by_name, n=3) or list(self._by_name)[:3]
            raise DepgraphError(f"there is no group '{name}'; did you mean {', '.join(near)}?")
        return self._by_name[name]

    def cost(self, sizes: Mapping[str, int]) -> tuple[int, int]:
        """Parameters and multiply-accumulates (batch 1) when groups have these sizes.

        Parameters
        ----------
        sizes : mapping of str to int
            Units left of each group; a group left out has its full size.

        Returns
        -------
        num_params, macs : int

        Notes
        -----
        Evaluates products of sizes; linear in the number of ops, independent of widths.
        """
        atoms = {self.group(name)._atom: size for name, size in sizes.items()}
        dead = self.dead(atoms)
        macs = self._macs.of_one_sample(atoms, dead.nodes)
        left = self.traced.parameters - dead.tensors
        return total_params(self.propagation, left, atoms), macs

    def dead(self, sizes: Mapping[Atom, int], mode: Propagation | None = None) -> Dead:
        """Modules that compute nothing anyone needs when atoms have these sizes.

        As the traced forward calls them, or as that of another one of `in_modes` does.
        """
        emptied = frozenset(atom for atom, size in sizes.items() if not size)
        if not emptied:
            return Dead()
        if emptied not in self._dead:
            self._dead[emptied] = find_dead_in_modes(self.in_modes, emptied)
        return self._dead[emptied][mode or self.propagation]

    def needs_a_unit(self, name: str) -> str | None:
        """Why at least one unit of a group has to stay; None where all of them may go.

        Parameters
        ----------
        name : str

        Raises
        ------
        DepgraphError
            When there is no such group.
        """
        return self._needs_a_unit.get(self.group(name)._atom)

    def check_plan(self, plan: Plan) -> None:
        """Raise DepgraphError for a plan of other groups, or one that empties what cannot be."""
        sizes = {group.name: group.size for group in self.prunable}
        for name in {**plan.sizes, **sizes}:
            if plan.sizes.get(name) != sizes.get(name):
                raise DepgraphError(
                    f"the plan is for another model: group '{name}' has {plan.sizes.get(name)} "
                    f"units in the plan and {sizes.get(name)} in the model; make a plan from this "
                    "model"
                )
        self.check_emptied(plan.kept_units)
        self.check_aligned({name: len(units) for name, units in plan.kept_units.items()})

    def multiple_of(self, name: str) -> int:
        """Of how many units a group keeps a multiple; 1 where any number may stay.

        Parameters
        ----------
        name : str

        Raises
        ------
        DepgraphError
            When there is no such group.
        """
        return self._multiples.get(self.group(name)._atom, 1)

    def check_aligned(self, sizes: Mapping[str, int]) -> None:
        """Refuse sizes of groups that a kernel would not take.

        Raises
        ------
        DepgraphError
            Naming the groups, the reason and the multiple to keep.
        """
        atoms = {self.group(name)._atom: size for name, size in sizes.items()}
        found = unaligned(self._aligned, atoms)
        if found is not None:
            own = {self.group(name)._atom: name for name in sizes}
            names = [own[atom] for atom in dict.fromkeys(axis_atoms(found.axis)) if atom in own]
            each = max(map(self.multiple_of, names))
            raise DepgraphError(
                f"group '{', '.join(names)}': {found.reason}; keep a multiple of {each} units"
            )

    @cached_property
    def _aligned(self) -> tuple[Aligned, ...]:
        return aligned_axes(self.propagation)

    @cached_property
    def _multiples(self) -> dict[Atom, int]:
        return multiples(self._aligned)

    def check_emptied(self, kept: Mapping[str, Sequence[int]]) -> None:
        """Refuse to empty a group of which a unit has to stay.

        Raises
        ------
        DepgraphError
            Naming the group and the reason.
        """
        for name, units in kept.items():
            reason = None if units else self.needs_a_unit(name)
            if reason:
                raise DepgraphError(
                    f"group '{name}': no unit would be left, but {reason}; keep at least one"
                )

    @cached_property
    def _needs_a_unit(self) -> dict[Atom, str]:
        reasons = needs_a_unit(self.propagation)
        for other in (*self.in_modes, *self._aside):
            reasons = {**needs_a_unit(other), **reasons}
        return reasons

    def lead(self, name: str) -> Group | None:
        """The group along whose units a group may keep others for each: heads, for head dims.

        Parameters
        ----------
        name : str

        Returns
        -------
        Group or None
            None where all that a group's units are part of has to keep the same ones.

        Raises
        ------
        DepgraphError
            When there is no such group.
        """
        atom = self._leads.get(self.group(name)._atom)
        return next((group for group in self.groups if group._atom is atom), None)

    @cached_property
    def _leads(self) -> dict[Atom, Atom]:
        leads = find_leads(self.propagation)
        for other in (*self.in_modes, *self._aside):
            there = find_leads(other)
            leads = {atom: lead for atom, lead in leads.items() if there.get(atom) is lead}
        return leads

    def plan(self, kept: Mapping[str, Any], stock_scale: bool = False) -> Plan:
        """A plan that keeps these units.

        Parameters
        ----------
        kept : mapping of str to sequence of int or Tensor
            Units to keep of each group; a group left out keeps all. Of a group that has a `lead`
            also one row of as many units for each unit of that one, removed or not: each head then
            keeps its own head dims.
        stock_scale : bool
            See `Plan`: by default no weight is changed where a forward is told its scale.

        Returns
        -------
        Plan

        Raises
        ------
        DepgraphError
            For an unknown or frozen group, for units that are out of range or repeated, for none
            where `needs_a_unit`, and for other than a multiple of `multiple_of`.
        """
        chosen: dict[str, tuple[int, ...]] = {}
        choices: dict[str, tuple[tuple[int, ...], ...]] = {}
        for name, units in kept.items():
            group = self.group(name)
            if has_rows(units):
                rows = check_rows(group, self.lead(name), units)
                units = rows[0]
                if len(set(rows)) > 1:
                    choices[name] = rows
                    units = range(len(rows[0]))
            numbers = check_units(name, group.size, units)
            if len(numbers) == group.size:
                continue
            if group.frozen is not None:
                raise DepgraphError(
                    f"group '{name}' is frozen ({group.frozen}); keep all of its units"
                )
            chosen[name] = numbers
        self.check_emptied(chosen)
        self.check_aligned({name: len(units) for name, units in chosen.items()})
        params, macs = self.cost({name: len(units) for name, units in chosen.items()})
        names = {group._atom: group.name for group in self.prunable}
        specs = {
            name: [axis_spec(axis, names) for axis in self.propagation.axes(node)]
            for name, node in self.traced.tensors.items()
        }
        parameters = self.traced.parameters
        return Plan(
            chosen,
            {group.name: group.size for group in self.prunable},
            params,
            macs,
            {name: spec for name, spec in specs.items() if name in parameters},
            {name: spec for name, spec in specs.items() if name not in parameters},
            input_spec(self.traced.example, self.traced.inputs_read),
            choices,
            trace_state(self.traced),
            stock_scale,
            _graph=self,
        )

    def kept_atoms(self, plan: Plan) -> dict[Atom, Tensor]:
        """Units kept by a plan, by the atom of each group; see `coupling.axes`."""
        return {
            self.group(name)._atom: torch.tensor(units, dtype=torch.long)
            for name, units in {**plan.kept_units, **plan.choices}.items()
        }

    def to_networkx(self) -> nx.MultiDiGraph:
        """Values, parameters and groups as nodes; data flow, couplings and membership as edges."""
        return build_networkx(self)

    def write_graphml(self, path: str | PathLike[str]) -> None:
        """Write `to_networkx` as GraphML, for Gephi, yEd, Cytoscape or ``networkx.read_graphml``.

        Parameters
        ----------
        path : path
            Written whole or not at all.

        Raises
        ------
        DepgraphError
            When the file cannot be written.
        """
        write_graphml(self.to_networkx(), path)
