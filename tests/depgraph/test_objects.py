"""Rewritten forwards that are given objects to keep something in, such as caches of keys."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
from tests.reference import masked, random_units, randomise


class Layer:
    """What one attention has seen so far."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.seen = 0


class Cache:
    """Layers, made when first asked for, and how often each was updated."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.updates: dict[int, int] = {}
        self.values: dict[int, Tensor] = {}

    def update(self, keys: Tensor, values: Tensor, place: int) -> tuple[Tensor, Tensor]:
        while len(self.layers) <= place:
            self.layers.append(Layer())
        layer = self.layers[place]
        layer.keys = keys if layer.keys is None else torch.cat([layer.keys, keys], 1)
        earlier = self.values.get(place)
        self.values[place] = values if earlier is None else torch.cat([earlier, values], 1)
        layer.seen += keys.size(1)
        self.updates[place] = self.updates.get(place, 0) + 1
        return layer.keys, self.values[place]


class Attention(nn.Module):
    """Reads its width where a cut needs a forward of its own; scales by what it has seen."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.out, self.place = nn.Linear(12, 8), place

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        q, k, v = (part(x).view(*x.shape[:2], 4, 3).sin() for part in (self.q, self.k, self.v))
        scale = 1.0
        if cache is not None:
            k, v = cache.update(k, v, self.place)
            scale = 1 / cache.layers[self.place].seen
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        result: Tensor = self.out(y.transpose(1, 2).reshape(*x.shape[:2], 12)) * scale
        return result


class Decoder(nn.Module):
    """Gives a cache to its layers, its own where the caller has none."""

    def __init__(self, own: bool = True) -> None:
        super().__init__()
        self.layers, self.own = nn.ModuleList(map(Attention, range(2))), own

    def forward(self, x: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        if cache is None and self.own:
            cache = Cache()
        for layer in self.layers:
            x = x + layer(x, cache=cache)
        return x, cache


def cut(model: nn.Module, *given: Any) -> tuple[nn.Module, nn.Module]:
    model = randomise(model).double().eval()
    graph = depgraph.trace(model, given)
    plan = graph.plan(random_units(graph, 0, 0.4))
    small = plan.apply(model)
    assert "depgraph_rewrite" in vars(type(small.get_submodule("layers.0")))
    return masked(model, plan), small


def tokens(batch: int, count: int) -> Tensor:
    return torch.randn(batch, count, 8, dtype=torch.float64)


def steps(model: nn.Module, sizes: list[int]) -> list[Tensor]:
    cache, found = None, []
    torch.manual_seed(0)
    for size in sizes:
        y, cache = model(tokens(2, size), cache)
        found += [y, torch.tensor([layer.seen for layer in cache.layers])]
        found += [torch.tensor(list(cache.updates.values()))]
    return found


@pytest.mark.parametrize("sizes", [[5], [5, 1, 1, 3], [1, 1, 5, 5]])
def test_what_is_kept_in_an_object_is_there_at_the_next_call(sizes: list[int]) -> None:
    reference, small = cut(Decoder(), tokens(2, 4))
    for got, expected in zip(steps(small, sizes), steps(reference, sizes), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_call_without_an_object_is_one_of_its_own() -> None:
    reference, small = cut(Decoder(own=False), tokens(2, 4))
    x, caches = tokens(3, 6), (Cache(), Cache())
    torch.testing.assert_close(small(x)[0], reference(x)[0])
    for _ in range(3):
        results = [
            model(x, cache)[0] for model, cache in zip((small, reference), caches, strict=True)
        ]
        torch.testing.assert_close(*results)
    assert caches[0].layers[1].seen == 18


def test_an_example_object_is_not_changed_by_a_trace() -> None:
    cache = Cache()
    reference, small = cut(Decoder(own=False), tokens(2, 4), cache)
    assert not cache.layers
    x = tokens(2, 3)
    torch.testing.assert_close(small(x, Cache())[0], reference(x, Cache())[0])


@torch.no_grad()
def test_objects_are_copied_with_what_a_pruned_model_left_in_them() -> None:
    reference, small = cut(Decoder(), tokens(2, 4))
    x = tokens(2, 4)
    caches = [model(x)[1] for model in (small, reference)]
    for cache in (caches, copy.deepcopy(caches)):
        results = [model(x, c)[0] for model, c in zip((small, reference), cache, strict=True)]
        torch.testing.assert_close(*results)


class Making(nn.Module):
    """Makes an object in a forward that has a width written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.ModuleList([Attention(0)]), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner[0].q(x).view(*x.shape[:2], 4, 3).sin().flatten(2)
        result: Tensor = self.out(self.inner[0](x, Cache())) + self.inner[0].out(y)
        return result


def test_a_rewritten_forward_that_makes_an_object_is_refused() -> None:
    model = Making().eval()
    graph = depgraph.trace(model, torch.zeros(2, 4, 8))
    with pytest.raises(depgraph.DepgraphError, match="makes a Cache"):
        graph.plan(random_units(graph, 0, 0.4)).apply(model)


def test_a_language_model_generates_with_its_cache_after_a_cut() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = randomise(transformers.LlamaForCausalLM(config)).double().eval()
    words = torch.randint(3, 20, (2, 6))
    graph = depgraph.trace(model, {"input_ids": words})
    plan = graph.plan(
        {g.name: range(g.size // 2) for g in graph.prunable if g.size > 1 and g.kind != "embed"}
    )
    small, reference = plan.apply(model), masked(model, plan)
    assert any("depgraph_rewrite" in vars(type(module)) for module in small.modules())
    made = [
        network.generate(words, max_new_tokens=5, do_sample=False, pad_token_id=0)
        for network in (small, reference)
    ]
    torch.testing.assert_close(*made)


class Keeping(nn.Module):
    """Changes attributes of its own in a forward that has a width written into it."""

    def __init__(self, keep: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.keep = nn.Linear(8, 12), nn.Linear(12, 8), keep
        self.kept: Any = None
        self.count = 0
        self.history: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).view(*x.shape[:2], 4, 3).sin()
        result: Tensor = self.b(self.keep(self, y).flatten(2))
        return result


def scores(net: Any, y: Tensor) -> Tensor:
    net.kept = (y @ y.mT).sum((2, 3))
    return y


def normalised(net: Any, y: Tensor) -> Tensor:
    net.kept = y.flatten(2).softmax(-1).sum(-1)
    return y


def first_of_all(net: Any, y: Tensor) -> Tensor:
    if not hasattr(net, "first"):
        net.first = y.new_full((), 3.0)
    net.kept = net.first
    return y * net.first


def counted(net: Any, y: Tensor) -> Tensor:
    net.count += 1
    return y * net.count


def listed(net: Any, y: Tensor) -> Tensor:
    net.history.append(y.sum((1, 2, 3)))
    return y + net.history[-1].mean()


def remembered(net: Any, y: Tensor) -> Tensor:
    before = y if net.kept is None else net.kept
    net.kept = y
    return y + before[:1]


KEEP = [scores, normalised, first_of_all, counted, listed, remembered]


@pytest.mark.parametrize("keep", KEEP)
def test_what_a_forward_keeps_in_its_module_it_keeps_once_rewritten(
    keep: Callable[..., Tensor],
) -> None:
    model = randomise(Keeping(keep)).double().eval()
    graph = depgraph.trace(model, tokens(2, 4))
    plan = graph.plan(random_units(graph, 0, 0.4))
    small, reference = plan.apply(model), masked(model, plan)
    assert "depgraph_rewrite" in vars(type(small))
    for batch in (2, 3, 3):
        x = tokens(batch, 4)
        torch.testing.assert_close(small(x), reference(x))
        assert small.count == reference.count
        assert len(small.history) == len(reference.history)  # type: ignore[arg-type]
        if keep in (scores, first_of_all):
            torch.testing.assert_close(small.kept, reference.kept)
    assert model.kept is None and not model.history


@pytest.mark.parametrize("keep", [scores, remembered])
def test_what_was_kept_before_a_cut_is_replaced_or_refused(keep: Callable[..., Tensor]) -> None:
    model = Keeping(keep).double().eval()
    graph = depgraph.trace(model, tokens(2, 4))
    plan = graph.plan(random_units(graph, 0, 0.4))
    with torch.no_grad():
        model(tokens(2, 4))
    if keep is scores:
        assert plan.apply(model)(tokens(2, 4)).shape == (2, 4, 8)
        return
    with pytest.raises(depgraph.DepgraphError, match="an earlier call left"):
        plan.apply(model)
