"""Ways to a cut other than one blow: in steps, or with the units to go shrunk in training first.

All of it is stateless: what a schedule has done so far is in the weights, so that a training that
is resumed goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import exp
from typing import Any

import torch
from torch import Tensor, nn

from depgraph import DependencyGraph, DepgraphError, Plan
from pruners.choosing.choices import choose_groups, kind_choices

STRENGTH = 6.0
"""Units to go are shrunk by ``exp(-STRENGTH)``, about 1/400, if no gradient pulls them back."""


def step_budget(
    dense: DependencyGraph,
    now: DependencyGraph,
    step: int,
    steps: int,
    *,
    ratio: float | None = None,
    target: Mapping[str, float] | None = None,
    kinds: Iterable[str] | None = None,
    ignore: Sequence[str] = (),
) -> dict[str, Any]:
    """Budget of one of several cuts, which end where a single cut would.

    Parameters
    ----------
    dense, now : DependencyGraph
        Of the model before all cuts, and before this one.
    step, steps : int
        Which cut, from 1, of how many. Every cut keeps the same share of what it finds.
    ratio, target, kinds, ignore
        Of all cuts together, as in `pruners.prune`.

    Returns
    -------
    dict
        ``{"ratio": ...}`` or ``{"target": ...}`` for `pruners.prune` of the model as it is now.

    Raises
    ------
    DepgraphError
        When the model is as small already as this step should make it.
    """
    if not 1 <= step <= steps:
        raise DepgraphError(f"step {step} is not one of the {steps} steps")
    if target is not None:
        ((what, share),) = target.items()
        if what not in ("params", "macs"):
            raise DepgraphError(
                f"several cuts cannot share a target of {what}; give params, macs or a ratio"
            )
        which = ("params", "macs").index(what)
        wanted = share ** (step / steps) * dense.cost({})[which]
        left = wanted / now.cost({})[which]
    else:
        share = 1 - (0.5 if ratio is None else ratio)
        units = [
            sum(g.size for g in choose_groups(graph, kind_choices(graph, kinds)[0], ignore))
            for graph in (dense, now)
        ]
        left = round(share ** (step / steps) * units[0]) / units[1]
    if left >= 1:
        raise DepgraphError(
            f"step {step} of {steps} has nothing left to remove; use fewer steps or a smaller "
            "round_to"
        )
    return {"ratio": 1 - left} if target is None else {"target": {what: left}}


def units_to_go(plan: Plan) -> dict[str, Tensor]:
    """Units that a plan drops, ascending, by group.

    Examples
    --------
    >>> import depgraph
    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> plan = depgraph.trace(model, torch.randn(1, 4)).plan({"hidden": [0, 3, 5]})
    >>> units_to_go(plan)["hidden"].tolist()
    [1, 2, 4]
    """
    gone = {}
    for name, kept in plan.kept_units.items():
        goes = torch.ones(plan.sizes[name], dtype=torch.bool)
        goes[list(kept)] = False
        gone[name] = goes.nonzero().flatten()
    return gone


def shrinker(
    graph: DependencyGraph, units: Mapping[str, Tensor]
) -> Callable[[nn.Module, float], None]:
    """How to multiply all weights of some units, over all members of their groups.

    Parameters
    ----------
    graph : DependencyGraph
    units : mapping of str to LongTensor
        By group name.

    Returns
    -------
    callable
        Takes a model of this graph and a factor, and changes the weights in place; 0 switches the
        units off.
    """
    places = [
        (member.parameter, member.dim, member.positions[chosen].flatten())
        for name, chosen in units.items()
        for member in graph.group(name).members
    ]

    @torch.no_grad()
    def shrink(model: nn.Module, factor: float) -> None:
        for name, dim, positions in places:
            weight = model.get_parameter(name)
            scale = torch.ones(weight.shape[dim], dtype=weight.dtype, device=weight.device)
            scale[positions.to(weight.device)] = factor
            weight.mul_(scale.view([-1 if d == dim else 1 for d in range(weight.dim())]))

    return shrink


def growing_decay(before: float, after: float, strength: float = STRENGTH) -> float:
    """Factor on the units to go for one update of a training with growing regularisation.

    Parameters
    ----------
    before, after : float
        Share of the training that is done before and after the update.
    strength : float
        Minus the logarithm of the product of all factors.

    Notes
    -----
    The penalty ``lambda |w|^2`` on the units to go, over all members of their groups, with a
    lambda that grows linearly, as a decay of the weights of its own beside the gradient, as AdamW
    does it: through Adam's normalised steps the penalty would hang on the learning rate.

    References
    ----------
    Wang, Qin, Zhang, Fu: "Neural Pruning via Growing Regularization", ICLR 2021 (GReg-1). Fang et
    al., "DepGraph: Towards Any Structural Pruning", CVPR 2023 (eq. 5: over whole groups).
    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.

    Examples
    --------
    >>> round(growing_decay(0, 0.5) * growing_decay(0.5, 1), 6) == round(exp(-STRENGTH), 6)
    True
    """
    return exp(-strength * (after**2 - before**2))


def soft_factor(done: float) -> float:
    """Factor on the units to go at the end of an epoch of soft pruning.

    Parameters
    ----------
    done : float
        Share of the training that is done; the factor falls linearly to 0, when it is over.

    Notes
    -----
    He et al. set the filters to zero, and what reads them gives the gradient that brings them back.
    All members of a group set to zero would get none: they are shrunk instead, the more the later,
    and chosen anew each epoch, so that those that grow again stay.

    References
    ----------
    He, Kang, Dong, Fu, Yang: "Soft Filter Pruning for Accelerating Deep Convolutional Neural
    Networks", IJCAI 2018. He et al., "Asymptotic Soft Filter Pruning", IEEE Trans. Cybernetics
    2020.
    """
    return 1 - done
