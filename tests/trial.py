"""One trial of the engine: a model, a random plan, and all that must hold of the result."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import depgraph
from tests.networks import Network
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

PLANS_WHEN_SHRINKING = 5
"""A smaller network may need another plan to fail."""


class Failure(Exception):
    """Something that must hold of every pruned model does not."""


@dataclass(frozen=True)
class Outcome:
    """What a trial did.

    Attributes
    ----------
    difference : float
        Largest relative difference between the sliced and the masked model.
    cut, prunable : int
        Groups that lost units, and groups that could.
    reasons : tuple of str
        Why the other groups of more than one unit could not.
    """

    difference: float
    cut: int
    prunable: int
    reasons: tuple[str, ...]


def try_network(network: Network, seed: int = 0) -> Outcome:
    """Prune a random network by a random plan and check everything that a user relies on.

    Parameters
    ----------
    network : Network
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
    model = randomise(network.build()).double()
    try:
        return try_model(model, network.example(2), network.example(3), seed)
    except Failure:
        raise
    except Exception as error:  # an engine that crashes has failed, too
        raise Failure(f"{type(error).__name__}: {error}") from error


@torch.no_grad()
def try_model(model: nn.Module, inputs: Tensor, more: Tensor, seed: int = 0) -> Outcome:
    """Prune a model by a random plan and check everything that a user relies on.

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
        graph = depgraph.trace(model, inputs)
        plan = graph.plan(_some_emptied(graph, random_units(graph, seed), seed))
        small = plan.apply(model)
        again = depgraph.Plan.from_json(plan.to_json()).apply(model)
        macs = depgraph.count_macs(small, inputs)
    except depgraph.DepgraphError as error:
        raise Failure(str(error)) from error
    difference = max(_difference(model, small, graph, plan, x) for x in (inputs, more))
    _demand(plan.num_params == measured_params(small), "the parameters are not as predicted")
    _demand(plan.macs == macs, f"the MACs are {macs}, not {plan.macs} as predicted")
    again.load_state_dict(small.state_dict())
    _demand(torch.equal(again(inputs), small(inputs)), "a plan from JSON slices otherwise")
    shapes = [m.train()(more).shape for m in (again, small)]
    _demand(shapes == [(len(more), *model(inputs).shape[1:])] * 2, "train mode has another shape")
    after = state(model)
    same = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    _demand(same, "the original was changed")
    reasons = [group.frozen for group in graph.groups if group.frozen]
    return Outcome(difference, len(plan.kept_units), len(graph.prunable), tuple(reasons))


def _some_emptied(
    graph: depgraph.DependencyGraph, kept: dict[str, list[int]], seed: int
) -> dict[str, list[int]]:
    """A fifth of the groups that may be emptied lose all of their units."""
    chance = random.Random(seed)
    may = {name for name in kept if chance.random() < EMPTIED and not graph.needs_a_unit(name)}
    return {name: [] if name in may else units for name, units in kept.items()}


def _difference(
    model: nn.Module,
    small: nn.Module,
    graph: depgraph.DependencyGraph,
    plan: depgraph.Plan,
    inputs: Tensor,
) -> float:
    expected = masked_output(model, graph, plan, inputs)
    try:
        got = small(inputs)
    except (RuntimeError, ValueError, TypeError, depgraph.DepgraphError) as error:
        raise Failure(f"the sliced model fails on batch {len(inputs)}: {error}") from error
    _demand(got.shape == expected.shape, f"the shape is {tuple(got.shape)}")
    difference = relative_difference(got, expected)
    _demand(difference <= TOLERANCE, f"batch {len(inputs)} differs by {difference:.1e}")
    return difference


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Failure(otherwise)


def why_it_fails(network: Network, seed: int) -> str | None:
    """What does not hold of a network under a plan; None when all does."""
    try:
        try_network(network, seed)
    except Failure as failure:
        return str(failure)
    return None


def shrink(network: Network, seed: int) -> tuple[Network, int]:
    """Leave out blocks as long as the network still fails under some plan.

    Parameters
    ----------
    network : Network
        Fails under the plan of ``seed``.
    seed : int

    Returns
    -------
    network, seed : Network, int
    """
    for i in range(len(network.blocks)):
        smaller = replace(network, blocks=network.blocks[:i] + network.blocks[i + 1 :])
        for other in range(seed, seed + PLANS_WHEN_SHRINKING):
            if why_it_fails(smaller, other) is not None:
                return shrink(smaller, other)
    return network, seed
