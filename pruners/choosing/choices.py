"""Which groups may be pruned, how far and in what steps, and what their scores are divided by."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import lcm

import torch
from torch import Tensor

from depgraph import DependencyGraph, DepgraphError, Group
from pruners.speed.latency import LatencyModel

NORMALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: scores / scores.mean().clamp_min(1e-30),
    "max": lambda scores: scores / scores.max().clamp_min(1e-30),
    "sum": lambda scores: scores / scores.sum().clamp_min(1e-30),
    "median": lambda scores: scores / scores.median().clamp_min(1e-30),
    "spread": lambda scores: (scores - scores.mean()) / scores.std(correction=0).clamp_min(1e-30),
    "rank": lambda scores: scores.argsort(stable=True).argsort(stable=True) / len(scores),
    "none": lambda scores: scores,
}
"""What scores of one group are divided by before groups are ranked together."""


@dataclass(frozen=True)
class Limits:
    """What an allocation has to respect.

    Attributes
    ----------
    min_units : int
        Units that stay in every group at least. With 0, groups may be emptied; one unit stays in
        those of which `DependencyGraph.needs_a_unit` says so.
    round_to : int or "auto"
        Kept counts are multiples of this; a group smaller than it stays whole. ``"auto"``: counts
        than which no larger one is as fast, by a latency model.
    """

    min_units: int = 1
    round_to: int | str = 1


class Unreachable(DepgraphError):
    """The chosen groups cannot give as much as is asked for."""

    def __init__(self, wanted: str, least: float) -> None:
        super().__init__(
            f"{wanted} cannot be reached: with these groups and limits at least {least:.4f} stays; "
            "prune more kinds, ignore less, lower min_units or round_to"
        )


AUTO = "auto"
"""In place of kinds: those that cost the least accuracy, more where it must be."""

_LAST = ("heads", "embed")
"""Kinds that are pruned only when the others are not enough, in this order."""


def kind_choices(
    graph: DependencyGraph, kinds: Iterable[str] | None
) -> list[tuple[str, ...] | None]:
    """The kinds to prune, and wider choices to try when these cannot reach a target.

    Parameters
    ----------
    graph : DependencyGraph
    kinds : iterable of str, None or "auto"
        See `pruners.choosing.allocation.allocator`.

    Returns
    -------
    list of tuple of str, or None for all kinds
    """
    if kinds is None:
        return [None]
    given = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if given != (AUTO,):
        return [given]
    present = dict.fromkeys(group.kind for group in graph.prunable)
    first = tuple(kind for kind in present if kind not in _LAST)
    choices = [first]
    for kind in _LAST:
        if kind in present:
            choices.append((*choices[-1], kind))
    return [choice for choice in choices if choice]


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a value that is none of the choices, with the nearest one as a hint."""
    options = list(choices)
    if value not in options:
        near = difflib.get_close_matches(str(value), options, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise DepgraphError(f"unknown {what} '{value}'; {hint}choose one of {', '.join(options)}")


def check_limits(min_units: int, round_to: int | str) -> Limits:
    """The two limits, refused when too small."""
    for name, value, least in (("min_units", min_units, 0), ("round_to", round_to, 1)):
        if name == "round_to" and value == AUTO:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise DepgraphError(
                f"{name} is {value!r}; it must be a whole number of at least {least}"
            )
    return Limits(min_units, round_to)


def choose_groups(
    graph: DependencyGraph, kinds: Iterable[str] | None, ignore: Sequence[str]
) -> list[Group]:
    """Prunable groups of the given kinds without a member that is to be ignored.

    Raises
    ------
    DepgraphError
        For a kind the model does not have, a pattern that matches nothing, or nothing left.
    """
    present = list(dict.fromkeys(group.kind for group in graph.prunable))
    wanted = present if kinds is None else [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in wanted:
        check_choice("kind", kind, present)
    groups = [group for group in graph.prunable if group.kind in wanted]
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    for pattern in patterns:
        if not any(_matches(group, pattern) for group in graph.groups):
            raise DepgraphError(f"ignore pattern '{pattern}' matches no module, parameter or group")
        groups = [group for group in groups if not _matches(group, pattern)]
    if not groups:
        raise DepgraphError("nothing is left to prune; ignore less, choose more kinds")
    return groups


def _matches(group: Group, pattern: str) -> bool:
    if fnmatchcase(group.name, pattern):
        return True
    for member in (*group.members, *group.buffers):
        parts = member.parameter.split(".")
        prefixes = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
        if any(fnmatchcase(prefix, pattern) for prefix in prefixes):
            return True
    return False


def normalised(group: Group, scores: Mapping[str, Tensor], how: str) -> Tensor:
    if group.name not in scores:
        raise DepgraphError(f"the metric gave no scores for group '{group.name}'")
    values = torch.as_tensor(scores[group.name]).detach().to("cpu", torch.float64)
    if values.shape != (group.size,):
        raise DepgraphError(
            f"the metric gave scores of shape {tuple(values.shape)} for group '{group.name}' of "
            f"{group.size} units"
        )
    if not torch.isfinite(values).all():
        raise DepgraphError(f"scores of group '{group.name}' are not finite; check the weights")
    return NORMALISATIONS[how](values)


def block_sizes(
    graph: DependencyGraph, group: Group, limits: Limits, latency: LatencyModel | None = None
) -> Tensor:
    """Sizes of the blocks that may go, one after the other, from a group."""
    size, step = group.size, limits.round_to
    needed = limits.min_units or int(graph.needs_a_unit(group.name) is not None)
    if isinstance(step, str):
        assert latency is not None  # checked by the allocator
        fast = latency.fast_sizes(group, least=min(needed, size))
        each = graph.multiple_of(group.name)
        counts = torch.tensor([n for n in fast if n % each == 0 or n == size])
        return counts.diff().flip(0)
    step = lcm(step, graph.multiple_of(group.name))
    least = -(-needed // step) * step
    if size <= least:
        return torch.zeros(0, dtype=torch.long)
    first = size % step or step
    return torch.tensor([first] + [step] * ((size - first - least) // step))
