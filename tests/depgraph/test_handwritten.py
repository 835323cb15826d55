"""Models as people write them by hand: packings, einsum, adapters, parametrizations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import depgraph
from tests.interpret import masked_outputs
from tests.reference import measured_params, random_units, randomise, relative_difference
from tests.trial import try_model

HEADS, DIM, WIDTH, TOKENS = 4, 6, 20, 5


class Written(nn.Module):
    """One attention within a residual, written by hand; subclasses say how."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(7, WIDTH), nn.Linear(WIDTH, 3)
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * HEADS * DIM), nn.Linear(HEADS * DIM, WIDTH)

    def packed(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).unbind(0)

    def turned(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = self.split(self.packed(self.norm(x)))
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


class HeadMajor(Written):
    """As GPT-NeoX packs: ``heads x (q ++ k ++ v)``."""

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.unflatten(-1, (HEADS, 3 * DIM)).transpose(1, 2).chunk(3, dim=-1)


class Adapted(Written):
    """Low-rank adapters on q and v, added in place to what one layer makes."""

    def __init__(self) -> None:
        super().__init__()
        size = HEADS * DIM
        self.a, self.b_q, self.b_v = nn.Linear(WIDTH, 8), nn.Linear(4, size), nn.Linear(4, size)

    def packed(self, x: Tensor) -> Tensor:
        qkv, low = self.qkv(x), self.a(x)
        qkv[:, :, : HEADS * DIM] += self.b_q(low[..., :4])
        qkv[:, :, -HEADS * DIM :] += self.b_v(low[..., 4:])
        return qkv


class Rotated(Written):
    """Rotary embeddings as products of complex numbers, with learnt frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(DIM // 2))

    def turned(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * self.frequencies
        turns = torch.polar(torch.ones_like(places), places)
        pairs = torch.view_as_complex(x.unflatten(-1, (DIM // 2, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)


class Summed(nn.Module):
    """Everything by einsum, three operands at once in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(7, WIDTH), nn.Linear(WIDTH, 3)
        for name in "qkv":
            setattr(self, name, nn.Parameter(torch.empty(WIDTH, HEADS, DIM)))
        self.mix = nn.Parameter(torch.empty(HEADS, HEADS))
        self.o = nn.Parameter(torch.empty(HEADS, DIM, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (torch.einsum("bnc,chd->bnhd", x, w) for w in (self.q, self.k, self.v))
        weights = (torch.einsum("bihd,bjhd->bhij", q, k) * DIM**-0.5).softmax(-1)
        weights = torch.einsum("bhij,hg->bgij", weights, self.mix)
        return self.head(x + torch.einsum("bhij,bjhd,hdc->bic", weights, v, self.o))


def example(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, TOKENS, 7, generator=generator).double()


def assert_alike(loaded: nn.Module, small: nn.Module) -> None:
    """The same bits; where they lie in memory may change the order in which torch adds them."""
    states = [model.state_dict() for model in (loaded, small)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert relative_difference(loaded(example(3)), small(example(3))) < 1e-12


@pytest.mark.parametrize("written", [HeadMajor, Adapted, Rotated, Summed])
def test_any_plan_computes_the_masked_original_and_heads_are_named(written: type) -> None:
    model = randomise(written()).double().eval()
    kinds = {group.kind for group in depgraph.trace(model, example(2)).prunable}
    assert {"heads", "head_dim", "embed"} <= kinds
    for seed in range(8):
        try_model(model, example(2), example(3), seed)


@pytest.mark.parametrize("emptied", ["heads", "head_dim"])
def test_packed_heads_may_all_go(emptied: str) -> None:
    model = randomise(HeadMajor()).double().eval()
    graph = depgraph.trace(model, example(2))
    plan = graph.plan({group.name: [] for group in graph.prunable if group.kind == emptied})
    (expected,) = masked_outputs(graph, plan, model, (example(2),))
    assert relative_difference(plan.apply(model)(example(2)), expected) < 1e-9


@pytest.mark.parametrize(
    "equation, sizes",
    [
        ("bhij,bjhd,hdc->bic", ((2, 4, 5, 5), (2, 5, 4, 6), (4, 6, 9))),
        ("bij,bjk,bkl->bil", ((2, 3, 4), (2, 4, 5), (2, 5, 6))),
        ("...qk,...kd->...qd", ((2, 3, 4, 5), (2, 3, 5, 6))),
        ("bnd,ned->bne", ((2, 1, 4), (3, 5, 4))),
        ("bnd->bdn", ((2, 3, 4),)),
        ("bnd,d->bnd", ((2, 3, 4), (4,))),
    ],
)
def test_an_einsum_costs_what_torch_counts(
    equation: str, sizes: tuple[tuple[int, ...], ...]
) -> None:
    class Einsum(nn.Module):
        def forward(self, *operands: Tensor) -> Tensor:
            return torch.einsum(equation, *operands)

    operands = tuple(map(torch.zeros, sizes))
    with FlopCounterMode(display=False) as counter:
        Einsum()(*operands)
    graph = depgraph.trace(Einsum(), operands)
    assert graph.macs == counter.get_total_flops() // 2 // graph.traced.batch


class PerSample(Written):
    """Says how many samples there are, to an op or in a loop."""

    def __init__(self, tokens: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.tokens = tokens

    def packed(self, x: Tensor) -> Tensor:
        return self.qkv(torch.cat([self.tokens(self.token, len(x)), x], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.packed(self.norm(self.stem(x))))
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        first = y.detach().sum(-1).argmax(1) * 0
        return self.head(y[torch.arange(len(x)), first])


@pytest.mark.parametrize(
    "tokens",
    [
        lambda token, batch: token.repeat(batch, 1, 1),
        lambda token, batch: token.tile(batch, 1, 1),
        lambda token, batch: token.repeat_interleave(batch, 0),
        lambda token, batch: torch.broadcast_to(token, (batch, 1, WIDTH)),
    ],
)
def test_a_generated_forward_makes_as_many_copies_as_there_are_samples(tokens: Callable) -> None:
    model = randomise(PerSample(tokens)).double().eval()
    for seed in range(4):
        try_model(model, example(2), example(3), seed)


class Loop(Written):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super(Loop, self).forward(x[i : i + 1])[0] for i in range(len(x))])


class Pieces(Written):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(Pieces, self).forward(piece) for piece in x.split(1)])


class Joined(Written):
    """Pieces that are put together after a join of one batch alone, which says nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(Joined, self).forward(piece) for piece in torch.cat([x]).split(1)])


@pytest.mark.parametrize("written", [Loop, Pieces, Joined])
def test_a_rewritten_forward_with_a_loop_over_samples_runs_at_other_batches(written: type) -> None:
    model = randomise(written()).double().eval()
    graph = depgraph.trace(model, example(2))
    plan = graph.plan({"head_dim": [0, 1, 2, 4]})
    x, small = example(4), plan.apply(model)
    expected = [
        output for i in (0, 2) for output in masked_outputs(graph, plan, model, (x[i : i + 2],))
    ]
    assert relative_difference(small(x), torch.cat(expected)) < 1e-9
    assert relative_difference(small(x[:3]), torch.cat(expected)[:3]) < 1e-9


PARAMETRIZED: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "weight norm of rows": lambda: (
        parametrizations.weight_norm(nn.Linear(7, WIDTH)),
        nn.Linear(WIDTH, 3),
    ),
    "weight norm of columns": lambda: (
        nn.Linear(7, WIDTH),
        parametrizations.weight_norm(nn.Linear(WIDTH, 3), dim=1),
    ),
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrized_layers_are_pruned_saved_and_loaded(name: str, tmp_path: Path) -> None:
    first, second = PARAMETRIZED[name]()
    model = randomise(nn.Sequential(first, nn.GELU(), second))
    model = model.double().eval()
    graph = depgraph.trace(model, example(2))
    assert [group.size for group in graph.prunable] == [WIDTH]
    for seed in range(4):
        plan = graph.plan(random_units(graph, seed))
        small = plan.apply(model)
        (expected,) = masked_outputs(graph, plan, model, (example(2),))
        assert relative_difference(small(example(2)), expected) < 1e-9
        assert measured_params(small) == plan.num_params
    depgraph.save(small, tmp_path)
    loaded = depgraph.load(tmp_path)
    assert_alike(loaded, small)
    parametrized = map(torch.nn.utils.parametrize.is_parametrized, loaded.children())
    assert sorted(parametrized) == [False, False, True]


def test_layers_of_einops_are_saved_and_loaded(tmp_path: Path) -> None:
    layers = pytest.importorskip(
        "einops.layers.torch", reason="einops is not installed (extra: bench)"
    )
    shuffle = layers.Rearrange("b n (h d) -> b h n d", h=HEADS)
    back = layers.Rearrange("b h n d -> b n (h d)")
    mean = layers.Reduce("b n c -> b c", "mean")
    model = nn.Sequential(
        nn.Linear(7, HEADS * DIM), shuffle, nn.Tanh(), back, mean, nn.Linear(HEADS * DIM, 3)
    ).double()
    graph = depgraph.trace(model, example(2))
    small = graph.plan({group.name: range(1, group.size) for group in graph.prunable}).apply(model)
    depgraph.save(small, tmp_path)
    assert_alike(depgraph.load(tmp_path), small)


class Named(NamedTuple):
    tokens: Tensor
    pooled: Tensor


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda tokens, pooled: (tokens, pooled),
    "list": lambda tokens, pooled: [tokens, pooled],
    "nested": lambda tokens, pooled: (tokens, [pooled, (tokens,)], {"pooled": (pooled,)}),
    "named tuple": Named,
    "ordered dict": lambda tokens, pooled: OrderedDict(tokens=tokens, pooled=pooled),
    "named in a dict": lambda tokens, pooled: {"out": Named(tokens, pooled), "tokens": [tokens]},
    "named in named": lambda tokens, pooled: Named((Named(tokens, pooled),), {"x": pooled}),
}


class Contained(Written):
    def __init__(self, container: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.container = container

    def forward(self, x: Tensor) -> Any:
        tokens = super().forward(x)
        return self.container(tokens, tokens.mean(1))


class Outer(nn.Module):
    """Reads a container that a child with a generated forward returns."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        tokens, pooled = self.child(x)
        return tokens + pooled[:, None]


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_generated_forward_returns_the_container_of_the_original(name: str) -> None:
    model = Contained(CONTAINERS[name]).double().eval()
    plan = depgraph.trace(model, example(2)).plan({"head_dim": [0, 3]})
    small = plan.apply(model)
    assert "depgraph_rewrite" in vars(type(small))
    got, expected = small(example(3)), model(example(3))
    assert type(got) is type(expected)
    assert pytree.tree_structure(got) == pytree.tree_structure(expected)


class OuterOfNested(Outer):
    def forward(self, x: Tensor) -> Tensor:
        inner = self.child(x)["out"]
        return inner.tokens + inner.pooled[:, None]


def test_a_named_tuple_within_what_a_child_returns_is_read() -> None:
    model = randomise(OuterOfNested(Contained(CONTAINERS["named in a dict"]))).double().eval()
    try_model(model, example(2), example(3), 1)


@pytest.mark.parametrize("name", ["tuple", "list", "named tuple"])
def test_a_container_of_a_child_is_read(name: str) -> None:
    model = randomise(Outer(Contained(CONTAINERS[name]))).double().eval()
    try_model(model, example(2), example(3), 1)
