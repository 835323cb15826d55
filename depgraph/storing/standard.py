"""Finds what a library's own constructor has to be told to build a pruned model, and proves it.

The words below only propose arguments. What they make counts when it has the names and shapes of
the pruned model, the same classes and attributes, and runs the same ops in both modes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from torch import nn

from depgraph.errors import DepgraphError
from depgraph.plan import Plan
from depgraph.storing.arguments import MAX_INTEGER
from depgraph.storing.find import (
    SOURCE,
    arguments_of,
    candidates,
    dense_shapes,
    is_of_library,
    numbers_of,
    size_of,
)
from depgraph.storing.guard import unguard
from depgraph.storing.outline import facts, first_difference, ops
from depgraph.storing.recipe import Recipe, build, config_arguments
from depgraph.storing.replay import replay
from depgraph.tracing.modules import named_modules
from depgraph.tracing.placing import registered

_WORDS = {
    "embed": ("embed_dim", "hidden_size"),
    "heads": ("num_heads", "num_attention_heads", "num_key_value_heads"),
    "hidden": ("intermediate_size",),
}
"""What constructors call the units of a kind of group."""

_HEAD_DIM = "head_dim"
KINDS = (*_WORDS, _HEAD_DIM)
"""Kinds of groups of which a constructor may be told the units."""

_RATIO = "mlp_ratio"
_OF_GATED = (1, 2, 1.5)
"""A gated MLP makes two widths of one number, or two thirds of it."""

_CONFIG = "config"
"""Attribute in which modules hold what their constructor was told."""


def standard_of(plan: Plan, model: nn.Module | None = None) -> Recipe | None:
    """See `depgraph.Plan.standard`."""
    if model is None:
        if plan._graph is None:
            raise DepgraphError(
                "a plan that was read does not know its model; pass the model to standard(), as it "
                "was before the plan or after it"
            )
        model = plan._graph.origin
    if model is None or not is_of_library(model):
        return None
    earlier = vars(model).get("depgraph_plans", [])
    return standard_recipe(model, earlier if plan in earlier else [*earlier, plan])


def standard_recipe(model: nn.Module, plans: Sequence[Plan]) -> Recipe | None:
    """How a library makes what plans make of a model.

    Parameters
    ----------
    model : nn.Module
        Before these plans or after them, with data or without; it is not changed.
    plans : sequence of Plan
        All that are applied since the constructor, earliest first.

    Returns
    -------
    dict or None
        None where no arguments are known to make it.
    """
    found_sizes = _uniform_sizes(plans)
    if found_sizes is None:
        return None
    told = getattr(model, _CONFIG, None)
    said = config_arguments(told) if hasattr(told, "to_dict") else None
    for recipe in candidates(model, plans):
        if said is not None and recipe["arguments"] != said:
            continue  # the note of a model that was told something else since
        try:
            dense = build(recipe, MAX_INTEGER)
            proposals = _proposals(recipe, dense, *found_sizes)
            found = [r for r in proposals if _has_shapes(r, plans[-1])]
            small = dense
            for plan in plans if found else ():
                replay(plan, small)
        except DepgraphError:
            continue  # it does not make the model
        return next((r for r in found if _is_proven(r, small, plans[-1])), None)
    return None


def _uniform_sizes(plans: Sequence[Plan]) -> tuple[dict[str, int], list[str]] | None:
    """Units left in each group of a kind, and the kinds that are cut; None where those differ."""
    first, last = plans[0].sizes, plans[-1]
    before: dict[str, set[int]] = {}
    after: dict[str, set[int]] = {}
    for name, size in first.items():
        kind = re.sub(r"_\d+$", "", name.rpartition(".")[2])
        left = len(last.kept_units[name]) if name in last.kept_units else last.sizes.get(name, 0)
        before.setdefault(kind, set()).add(size)
        after.setdefault(kind, set()).add(left)
    cut = [kind for kind in after if before[kind] != after[kind]]
    if any(len(after[kind]) > 1 or kind not in KINDS for kind in cut):
        return None
    sizes = {kind: min(left) for kind, left in after.items() if len(left) == 1 and min(left)}
    return sizes, cut


def _proposals(
    recipe: Recipe, dense: nn.Module, sizes: Mapping[str, int], cut: Sequence[str]
) -> Iterator[Recipe]:
    """Recipes that may make the pruned model, the plainest first."""
    told = recipe["arguments"]
    known = {*told, *arguments_of(dense)}
    numbers = {
        kind: sizes.get(kind) or next((told[key] for key in keys if key in told), None)
        for kind, keys in _WORDS.items()
    }
    if numbers["embed"] is None:
        numbers["embed"] = next(iter(numbers_of(dense, _WORDS["embed"][0])), None)
    said = {k: numbers[kind] for kind in cut for k in _WORDS.get(kind, ()) if k in known}
    said = {key: number for key, number in said.items() if number is not None}
    heads: list[dict[str, Any]] = [{}, {_HEAD_DIM: sizes.get(_HEAD_DIM)}]
    if _HEAD_DIM in told or _HEAD_DIM not in sizes:
        heads = heads[_HEAD_DIM in sizes :]
    ratios: list[dict[str, Any]] = [{}]
    if _RATIO in known and numbers["hidden"] and numbers["embed"]:
        whole = type(told.get(_RATIO)) is int
        ratios = [{_RATIO: r} for r in _ratios(numbers["hidden"], numbers["embed"], whole)]
    for ratio, head in product(ratios, heads):
        yield {**recipe, "arguments": {**told, **said, **ratio, **head}}


def _ratios(hidden: int, embed: int, whole: bool) -> Iterator[float]:
    """What a width may be written as, in units of another; constructors cut off the fraction."""
    for times in _OF_GATED:
        wanted = hidden * times
        ratio = wanted / embed
        if ratio == int(ratio) or not whole:
            exact = int(embed * ratio) == wanted
            ratio = ratio if exact else (wanted + 0.5) / embed
            yield int(ratio) if whole else ratio


def _has_shapes(recipe: Recipe, plan: Plan) -> bool:
    """Whether a recipe makes tensors of the names and shapes that a plan leads to."""
    try:
        found = dense_shapes(build(recipe, MAX_INTEGER), ())
    except DepgraphError:
        return False  # the constructor does not take these arguments
    sizes = {**plan.sizes, **{name: len(units) for name, units in plan.kept_units.items()}}
    return all(
        found.get(name) == tuple(size_of(spec, sizes) for spec in specs)
        for name, specs in {**plan.axes, **plan.buffer_axes}.items()
    )


def _is_proven(recipe: Recipe, small: nn.Module, plan: Plan) -> bool:
    """Whether what a recipe makes is a pruned model, but for the values of its tensors."""
    stock = build(recipe, MAX_INTEGER)
    return difference(stock, small, plan) is None


def difference(stock: nn.Module, small: nn.Module, plan: Plan) -> str | None:
    """The first thing in which two models differ, beside values and the configurations they hold.

    Parameters
    ----------
    stock, small : nn.Module
    plan : Plan
        The last one of the second; it has inputs to trace both with.
    """
    first, second = ({n: tuple(t.shape) for n, t in registered(m).items()} for m in (stock, small))
    odd = next((name for name in {**first, **second} if first.get(name) != second.get(name)), None)
    ours, theirs = named_modules(small), named_modules(stock)
    if odd is None:
        odd = next((name for name in ours if type(ours[name]) is not type(theirs.get(name))), None)
    if odd is not None:
        return odd
    for training in (False, True):
        state = {**plan.state, "training": training, "others": []}
        inputs = Plan({}, {}, 0, 0, {}, {}, plan.inputs, state=state)
        try:
            odd = first_difference(ops(stock, inputs)[0], ops(small, inputs)[0])
        except DepgraphError as error:
            return str(error)
        if odd is not None:
            return odd
    return first_difference(_without_config(facts(stock)), _without_config(facts(small)))


def _without_config(found: Mapping[str, str]) -> dict[str, str]:
    return {name: says for name, says in found.items() if name.rpartition(".")[2] != _CONFIG}


def recipe_of(small: nn.Module) -> Recipe | None:
    """How a library makes a pruned model as it is now; None where it cannot."""
    plans = vars(small).get("depgraph_plans", [])
    recipe = standard_recipe(small, plans) if plans and is_of_library(small) else None
    return recipe if recipe is not None and _is_proven(recipe, small, plans[-1]) else None


def make_standard(small: nn.Module) -> None:
    """Let a pruned model be the one that its library's constructor makes, in place.

    Parameters
    ----------
    small : nn.Module
        It gets the configurations that the constructor gives it, and says how it is made in place
        of the plans it carries.

    Raises
    ------
    DepgraphError
        When no constructor is known to make it; it is unchanged then.
    """
    recipe = recipe_of(small)
    if recipe is None:
        raise DepgraphError(
            f"no arguments are known with which a library makes this {type(small).__name__}; prune "
            "it with pruners.prune(..., standard=True), or use depgraph.save and depgraph.load"
        )
    stock = named_modules(build(recipe, MAX_INTEGER))
    for name, module in named_modules(small).items():
        if _CONFIG in vars(module):
            vars(module)[_CONFIG] = vars(stock[name])[_CONFIG]
    unguard(small)
    vars(small)[SOURCE] = recipe
    vars(small).pop("depgraph_plans", None)
