"""A weight that is normalised over a dimension keeps its value, or the dimension stays whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import depgraph
from tests.reference import randomise, relative_difference
from tests.trial import try_model

Map = Callable[[Tensor], Tensor]
HIDDEN = 6


class Own(nn.Module):
    """A layer that computes with a function of its weight."""

    def __init__(self, how: Map) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, HIDDEN))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.how(self.weight))


class Cosine(Own):
    """Divides by the lengths of weights only after the product."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) / self.weight.norm(dim=1) / x.norm(dim=1, keepdim=True)


class Spectral(Own):
    """A spectral norm by hand, from vectors that are kept."""

    def __init__(self, how: Map) -> None:
        super().__init__(how)
        self.register_buffer("u", torch.randn(5))
        self.register_buffer("v", torch.randn(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return self.how(F.linear(x, self.weight)) / (self.u @ self.weight @ self.v)


class Bias(Own):
    """Normalised is what is added to an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x + self.how(self.weight[0]), self.weight)


class Scaled(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.how(self.weight[0]), self.weight)


class Dot(Own):
    def forward(self, x: Tensor) -> Tensor:
        return (x[:, None] * self.how(self.weight)).sum(-1)


def rms(w: Tensor) -> Tensor:
    return w * torch.rsqrt(w.square().mean(-1, keepdim=True) + 1e-5)


def centred(w: Tensor) -> Tensor:
    return w - w.mean(-1, keepdim=True)


def standardised(w: Tensor) -> Tensor:
    return centred(w) / (w.var(-1, keepdim=True) + 1e-5).sqrt()


def unit(w: Tensor) -> Tensor:
    return F.normalize(w, dim=-1)


def layer_norm(w: Tensor) -> Tensor:
    return F.layer_norm(w, w.shape[-1:])


def batch_norm(w: Tensor) -> Tensor:
    flat = F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True)
    return flat.reshape_as(w)


def linear() -> nn.Linear:
    return nn.Linear(HIDDEN, 5)


NORMALISED: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(linear()),
    "weight norm of the whole": lambda: parametrizations.weight_norm(linear(), dim=None),
    "spectral norm": lambda: parametrizations.spectral_norm(linear()),
    "spectral norm by a hook": lambda: torch.nn.utils.spectral_norm(linear()),
    "cosine, divided later": lambda: Cosine(unit),
    "spectral norm by hand": lambda: Spectral(torch.relu),
    **{
        f"{how.__name__} {kind.__name__}": lambda how=how, kind=kind: kind(how)  # type: ignore[misc]
        for how in (rms, centred, standardised, unit)
        for kind in (Own, Bias, Scaled, Dot)
    },
    "layer norm": lambda: Own(layer_norm),
    "layer norm, scaled": lambda: Scaled(layer_norm),
    "batch norm": lambda: Own(batch_norm),
    "mean of magnitudes": lambda: Own(lambda w: w / w.abs().mean(1, keepdim=True)),
    "largest magnitude": lambda: Own(lambda w: w / w.abs().amax(1, keepdim=True)),
    "length of a product": lambda: Own(lambda w: w / (w @ w.T).diagonal()[:, None].sqrt()),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NORMALISED)
def test_what_a_weight_is_normalised_over_stays_whole_and_says_why(
    name: str, training: bool
) -> None:
    model = nn.Sequential(nn.Linear(4, HIDDEN), nn.ReLU(), NORMALISED[name]()).train(training)
    graph = depgraph.trace(model, torch.randn(3, 4))
    (group,) = (
        g for g in graph.groups if any((m.parameter, m.dim) == ("0.weight", 0) for m in g.members)
    )
    assert group.size == HIDDEN
    assert group.frozen is not None


def test_so_does_what_the_weights_of_a_unit_are_normalised_with() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.out = nn.Parameter(torch.randn(HIDDEN, 4)), nn.Linear(HIDDEN, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(F.linear(x, F.normalize(self.weight, dim=0)))
            return y

    assert not depgraph.trace(First(), torch.randn(3, 4)).prunable


ALONG_OTHERS: dict[str, Callable[[], nn.Module]] = {
    "plain": linear,
    "weight norm": lambda: parametrizations.weight_norm(linear(), dim=1),
    "unit": lambda: Own(lambda w: F.normalize(w, dim=0)),
    "standardised": lambda: Own(lambda w: (w - w.mean(0)) / w.std(0)),
    "tanh": lambda: Own(torch.tanh),
    "orthogonal": lambda: parametrizations.orthogonal(linear()),
    "total": lambda: Own(lambda w: w + w.sum(0, keepdim=True)),
}


@pytest.mark.parametrize("name", ALONG_OTHERS)
def test_a_weight_that_is_normalised_along_another_dimension_keeps_its_values(name: str) -> None:
    model = randomise(nn.Sequential(nn.Linear(4, HIDDEN), nn.ReLU(), ALONG_OTHERS[name]()))
    model = model.double().eval()
    graph = depgraph.trace(model, torch.randn(3, 4).double())
    (group,) = graph.prunable
    small = graph.plan({group.name: [0, 2, 5]}).apply(model)
    on = torch.tensor([1, 0, 1, 0, 0, 1])
    for batch in (3, 7):
        x = torch.randn(batch, 4).double()
        assert relative_difference(small(x), model[2](model[1](model[0](x)) * on)) < 1e-9


class Factors(nn.Module):
    """A weight plus a product of low rank, its columns of one length (DoRA)."""

    def __init__(self, rank: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 5, bias=False)
        self.a, self.b = nn.Parameter(torch.randn(rank, 7)), nn.Parameter(torch.randn(5, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.layer.weight + self.b @ self.a, dim=1))


class Tokens(nn.Module):
    """Learned tokens in a norm, and a table of positions through layers of its own."""

    def __init__(self, norm: Callable[[int], nn.Module], width: int = 8) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, width), norm(width)
        self.tokens = nn.Parameter(torch.randn(1, 3, width))
        self.q, self.k, self.out = nn.Linear(width, 4), nn.Linear(width, 4), nn.Linear(width, 2)
        self.register_buffer("places", torch.randn(3, 2))
        self.bias = nn.Sequential(nn.Linear(2, 9), nn.ReLU(), nn.Linear(9, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        tokens = self.norm(self.tokens)
        both = torch.cat([x, tokens.expand(len(x), -1, -1)], 1)
        score = self.q(tokens) @ self.k(both).mT + self.bias(self.places)
        return self.out(score.softmax(-1) @ both)


class RMS(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * rms(x)


def test_the_rank_of_a_product_of_weights_may_be_cut() -> None:
    graph = depgraph.trace(Factors(), torch.randn(3, 7))
    assert [group.size for group in graph.prunable] == [4]
    model = randomise(Factors()).double().eval()
    try_model(model, torch.randn(2, 7).double(), torch.randn(3, 7).double(), 1)


@pytest.mark.parametrize("norm", [nn.LayerNorm, RMS])
def test_a_norm_of_learned_tokens_takes_its_statistics_over_what_is_kept(
    norm: Callable[[int], nn.Module],
) -> None:
    model = randomise(Tokens(norm)).double().eval()
    x = torch.randn(3, 2, 6).double()
    sizes = {group.size for group in depgraph.trace(model, x[:2]).prunable}
    assert sizes >= {8, 4, 9}
    for seed in range(3):
        try_model(model, x[:2], x, seed)


class Two(nn.Module):
    """A layer on a function of the activations of two others."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.y, self.z, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.how(self.y(x), self.z(x)))


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def var(x: Tensor) -> Tensor:
    return x.var(-1, correction=0, keepdim=True) + 1e-5


NORMS_WRITTEN_OUT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rms": lambda y, z: y * torch.rsqrt(mean(y.pow(2)) + 1e-5) + z,
    "rms past a cast": lambda y, z: z + y.to(z) * torch.rsqrt(mean(y.double().pow(2)) + 1e-5),
    "rms of a quotient": lambda y, z: z + y / (mean(y * y) + 1e-5).sqrt(),
    "rms by a reciprocal": lambda y, z: z + y * (mean(y * y) + 1e-5).sqrt().reciprocal(),
    "deviation": lambda y, z: z + y / (y.std(-1, correction=0, keepdim=True) + 1e-5),
    "variance": lambda y, z: z + (y - mean(y)) / var(y).sqrt(),
    "centred once": lambda y, z: z + (d := y - mean(y)) * torch.rsqrt(mean(d.square()) + 1e-5),
    "centred twice": lambda y, z: (
        z + (y - (m := mean(y))) / torch.sqrt(mean((y - m).pow(2)) + 1e-5)
    ),
    "of a sum": lambda y, z: (s := y + z) * torch.rsqrt(mean(s.pow(2)) + 1e-5),
}
NO_NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "another is scaled": lambda y, z: z * torch.rsqrt(mean(y.pow(2)) + 1e-5),
    "another is scaled, too": lambda y, z: y * (r := torch.rsqrt(mean(y.pow(2)) + 1e-5)) + z * r,
    "another by a variance": lambda y, z: z / var(y).sqrt(),
    "another by a deviation": lambda y, z: y + z / y.std(-1, keepdim=True),
    "centred by another": lambda y, z: (z - mean(y)) / var(z).sqrt(),
    "centred alone": lambda y, z: y - mean(y) + z,
    "centred, another scaled": lambda y, z: (y - mean(y)) / var(z).sqrt(),
    "the root itself": lambda y, z: y + (mean(y.pow(2)) + 1e-5).sqrt(),
    "by the square": lambda y, z: z + y / (mean(y.pow(2)) + 1e-5),
    "a nonlinearity between": lambda y, z: z + y.relu() * torch.rsqrt(mean(y.pow(2)) + 1e-5),
    "what is below": lambda y, z: z + (mean(y.pow(2)) + 1e-5).sqrt() / (y.abs() + 1),
}


def frozen(model: nn.Module, parameter: str) -> str | None:
    graph = depgraph.trace(model, torch.randn(3, 4).double())
    return next(
        group.frozen
        for group in graph.groups
        if any((m.parameter, m.dim) == (parameter, 0) for m in group.members)
    )


@pytest.mark.parametrize("name", NORMS_WRITTEN_OUT)
def test_a_norm_that_is_written_out_is_one(name: str) -> None:
    model = randomise(Two(NORMS_WRITTEN_OUT[name])).double().eval()
    assert frozen(model, "y.weight") is None
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
    for seed in range(4):
        try_model(model, x[:2], x, seed)


@pytest.mark.parametrize("name", NO_NORMS)
def test_what_scales_or_shifts_another_value_is_no_norm(name: str) -> None:
    model = randomise(Two(NO_NORMS[name])).double().eval()
    assert frozen(model, "y.weight") is not None
