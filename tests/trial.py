"""One trial of the engine: a model, a random plan, and all that must hold of the result."""

from __future__ import annotations

import random
import re
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

import depgraph
from depgraph.coupling.axes import Atom, axis_atoms
from tests.agreement import Agreement, Finding, converted, without_dropout
from tests.interpret import masked_outputs
from tests.networks import OTHER_SIZES, Network
from tests.reference import (
    masked_output,
    measured_params,
    random_units,
    randomise,
    relative_difference,
    state,
)

TOLERANCE = 1e-9
"""Largest relative difference of two float64 computations that are the same."""

EMPTIED = 0.2
"""Share of the groups, among those that may be emptied, that are."""

PLANS_WHEN_SHRINKING = 3
"""A smaller network may need another plan to fail."""

OTHER_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of these a network is run in two, drawn by its seed: each has its forwards written anew."""

UNDER_AUTOCAST = 0.2
"""Share of the networks that are run under autocast in place of one of these."""

REPLAYED = 0.25
"""Share of the networks of which the plan is also read from JSON, and cut anew."""

WEIGHT_KINDS = {"reparametrised", "computed"}
"""Blocks that compute weights, which must stay what they are where their readers are cut."""


class Failure(Exception):
    """Something that must hold of every pruned model does not."""


@dataclass(frozen=True)
class Outcome:
    """What a trial did.

    Attributes
    ----------
    difference : float
        Largest relative difference between the sliced and the masked model, in float64.
    cut, prunable : int
        Groups that lost units, and groups that could.
    reasons : tuple of str
        Why the other groups of more than one unit could not.
    findings : tuple of Finding
        What did not hold, and what was refused.
    checks : int
        Runs that were compared with the original's.
    """

    difference: float = 0.0
    cut: int = 0
    prunable: int = 0
    reasons: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    checks: int = 0

    @property
    def worst(self) -> Finding | None:
        """The finding to report."""
        return min(self.findings, key=lambda f: SEVERITY.index(f.outcome), default=None)


SEVERITY = ("wrong", "crashed", "refused")


def try_network(network: Network, seed: int = 0) -> Outcome:
    """As `examine`, but raise `Failure` where something does not hold; refusals are none."""
    outcome = examine(network, seed)
    if outcome.worst is not None and outcome.worst.outcome != "refused":
        raise Failure(str(outcome.worst))
    return outcome


@dataclass(frozen=True)
class _Cut:
    model: nn.Module
    small: nn.Module
    graph: depgraph.DependencyGraph
    plan: depgraph.Plan


def examine(network: Network, seed: int = 0) -> Outcome:
    """Prune a random network by a random plan and compare it with the original in many ways.

    Parameters
    ----------
    network : Network
    seed : int
        Of the plan.

    Returns
    -------
    Outcome
        Of batches 1, 2, that of the trace and another, up to two other sizes, two other types, both
        modes, an optimiser step and a copy.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about types and sizes that the original has
        return _examined(network, seed)


def _examined(network: Network, seed: int) -> Outcome:
    dtype = network.dtype if _runs(network) else torch.float64
    model = without_dropout(randomise(network.build()).to(dtype)).train(network.training)
    inputs = converted(network.example(network.batch), dtype)
    before = state(model)
    try:
        cut = _prune(model, inputs, seed)
    except depgraph.DepgraphError as error:
        return Outcome(findings=(Finding("refused", "the cut", str(error)),))
    except Exception as error:  # noqa: BLE001  an engine that crashes has failed, too
        return Outcome(findings=(Finding("crashed", "the cut", _said(error)),))
    agree = Agreement(model, cut.small, cut.graph, cut.plan, network.source())
    _predictions(agree, cut, inputs, seed)
    after = state(model)
    same = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    agree.demand(same, "the original", "was changed")
    _stated_weights(agree, cut, network, dtype)
    for other in _two_types(network, dtype):
        if other == "autocast":
            agree.under_autocast(network.example(2))
        else:
            agree.in_type(other, network.example(2))
    agree.to(torch.float64)
    _batches_and_sizes(agree, network)
    agree.copied(network.example(2))
    agree.step(network.example(network.batch + 1))
    reasons = tuple(group.frozen for group in cut.graph.groups if group.frozen)
    numbers = (agree.difference, len(cut.plan.kept_units), len(cut.graph.prunable), reasons)
    return Outcome(*numbers, tuple(agree.findings), agree.checks)


def _prune(model: nn.Module, inputs: Tensor, seed: int) -> _Cut:
    graph = depgraph.trace(model, inputs)
    plan = graph.plan(_some_emptied(graph, random_units(graph, seed), seed))
    return _Cut(model, plan.apply(model), graph, plan)


def _two_types(network: Network, dtype: torch.dtype) -> list[Any]:
    chance = random.Random(network.seed)
    first, second = chance.sample([t for t in OTHER_TYPES if t is not dtype], 2)
    return [first, "autocast" if chance.random() < UNDER_AUTOCAST else second]


def _predictions(agree: Agreement, cut: _Cut, inputs: Tensor, seed: int) -> None:
    right = cut.plan.num_params == measured_params(cut.small)
    agree.demand(right, "the prediction", "the parameters are not as predicted")
    chosen = random.Random(seed).random() < REPLAYED
    again = agree.attempt("a plan from JSON", lambda: _replayed(cut)) if chosen else None
    if again is not None:
        shapes = {n: t.shape for n, t in cut.small.state_dict().items()}
        same = shapes == {n: t.shape for n, t in again.state_dict().items()}
        agree.demand(same, "a plan from JSON", "slices otherwise")
    if not cut.graph._macs._batch and not all(cut.plan.kept_units.values()):
        return  # what is gone tells no longer that the leading dimension is summed over: no batch
    macs = agree.attempt("counting", lambda: depgraph.count_macs(cut.small, inputs))
    text = f"the MACs are {macs}, not {cut.plan.macs} as predicted"
    agree.demand(macs in (None, cut.plan.macs), "the prediction", text)


def _replayed(cut: _Cut) -> nn.Module:
    return depgraph.Plan.from_json(cut.plan.to_json()).apply(cut.model)


@torch.no_grad()
def _runs(network: Network) -> bool:
    """Whether it has all its ops in the type that it is to be traced in."""
    try:
        network.build().to(network.dtype)(converted(network.example(2), network.dtype))
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _stated_weights(agree: Agreement, cut: _Cut, network: Network, dtype: torch.dtype) -> None:
    """Weights computed from weights are what they were, although their readers lost units."""
    kinds = {kind for kind, _ in network.blocks}
    if not kinds & WEIGHT_KINDS or "in_place" in kinds or network.training:
        return
    if not cut.graph.kept_atoms(cut.plan).keys() <= _of_activations(cut.graph):
        return  # the rank of ``a @ b``, which is a weight: switching it off changes the product
    given = cut.graph.traced.inputs[0].meta["val"].shape
    batch = given[1 if network.start == "sequence" else 0]  # a batch of one is traced as two
    inputs = converted(network.example(batch), dtype)
    expected = masked_outputs(cut.graph, cut.plan, cut.model, (inputs,), weights_stay=True)
    agree.compare("computed weights", inputs, expected, dtype)


def _of_activations(graph: depgraph.DependencyGraph) -> set[Atom]:
    p = graph.propagation
    active: set[fx.Node] = set(p.trace.inputs)
    found: set[Atom] = set()
    for node in p.trace.nodes:
        if node in active or not active.isdisjoint(node.all_input_nodes):
            active.add(node)
            for axes in (p.axes(node), *p.results(node)):
                found.update(atom for axis in axes for atom in axis_atoms(axis))
    return found


def _batches_and_sizes(agree: Agreement, network: Network) -> None:
    batches = sorted({1, 2, network.batch, 5})
    for training in (False, True):
        agree.train(training)
        mode = ", training" if training else ""
        for batch in batches if not training else batches[1:3]:
            agree.run(f"batch{mode}", network.example(batch))
        taken = 0
        for size in OTHER_SIZES[network.start]:
            if taken < 2:
                taken += agree.run(f"size{mode}", network.example(2, size), rows=2)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


@torch.no_grad()
def try_model(model: nn.Module, inputs: Tensor, more: Tensor, seed: int = 0) -> Outcome:
    """Prune a model by a random plan and check what a user relies on; refusals are failures.

    Parameters
    ----------
    model : nn.Module
        In eval mode and float64.
    inputs, more : Tensor
        To trace with, and of another batch size.
    seed : int
        Of the plan.

    Returns
    -------
    Outcome

    Raises
    ------
    Failure
        Saying what does not hold.
    """
    before = state(model)
    try:
        cut = _prune(model, inputs, seed)
        again = _replayed(cut)
        macs = depgraph.count_macs(cut.small, inputs)
    except depgraph.DepgraphError as error:
        raise Failure(str(error)) from error
    difference = max(_difference(cut, x) for x in (inputs, more))
    plan, small = cut.plan, cut.small
    _demand(plan.num_params == measured_params(small), "the parameters are not as predicted")
    _demand(plan.macs == macs, f"the MACs are {macs}, not {plan.macs} as predicted")
    again.load_state_dict(small.state_dict())
    _demand(torch.equal(again(inputs), small(inputs)), "a plan from JSON slices otherwise")
    shapes = [m.train()(more).shape for m in (again, small)]
    _demand(shapes == [(len(more), *model(inputs).shape[1:])] * 2, "train mode has another shape")
    after = state(model)
    same = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    _demand(same, "the original was changed")
    reasons = tuple(group.frozen for group in cut.graph.groups if group.frozen)
    return Outcome(difference, len(plan.kept_units), len(cut.graph.prunable), reasons)


def _some_emptied(
    graph: depgraph.DependencyGraph, kept: dict[str, list[int]], seed: int
) -> dict[str, list[int]]:
    """A fifth of the groups that may be emptied lose all of their units."""
    chance = random.Random(seed)
    may = {name for name in kept if chance.random() < EMPTIED and not graph.needs_a_unit(name)}
    return {name: [] if name in may else units for name, units in kept.items()}


def _difference(cut: _Cut, inputs: Tensor) -> float:
    expected = masked_output(cut.model, cut.graph, cut.plan, inputs)
    try:
        got = cut.small(inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        raise Failure(f"the sliced model fails on batch {len(inputs)}: {error}") from error
    _demand(got.shape == expected.shape, f"the shape is {tuple(got.shape)}")
    difference = relative_difference(got, expected)
    _demand(difference <= TOLERANCE, f"batch {len(inputs)} differs by {difference:.1e}")
    return difference


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Failure(otherwise)


def shrink(network: Network, seed: int) -> tuple[Network, int]:
    """Leave out blocks as long as the network still fails in the same way under some plan.

    Parameters
    ----------
    network : Network
        Fails, or is refused, under the plan of ``seed``.
    seed : int

    Returns
    -------
    network, seed : Network, int
    """
    worst = examine(network, seed).worst
    return (network, seed) if worst is None else _smaller(network, seed, worst)


def _smaller(network: Network, seed: int, worst: Finding) -> tuple[Network, int]:
    for i in range(len(network.blocks)):
        fewer = replace(network, blocks=network.blocks[:i] + network.blocks[i + 1 :])
        for other in range(seed, seed + PLANS_WHEN_SHRINKING):
            found = examine(fewer, other).findings
            if any((f.outcome, f.check) == (worst.outcome, worst.check) for f in found):
                return _smaller(fewer, other, worst)
    return network, seed


def kind_of(finding: Finding) -> str:
    """What was found, without names and numbers."""
    text = finding.text.split("\n")[0]
    text = re.sub(r"\([^()]*, line \d+\)", "", text)
    text = re.sub(r"'[^']*'( \(\w+\))?|`[^`]*`|\"[^\"]*\"", "..", text)
    text = re.sub(r"\[[^\]]*\]", "[..]", text)
    text = re.sub(r"\b\d[\w.+-]*", "n", text)
    return f"{finding.check}: {' '.join(text.split())}"[:140]
