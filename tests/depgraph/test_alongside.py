"""What runs besides the traced forward, or never, fits after a cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depgraph
import pruners
from tests.reference import masked, random_units, randomise, relative_difference

WIDTH = 12


def example(batch: int = 2) -> Tensor:
    return torch.randn(batch, 5, 8, generator=torch.Generator().manual_seed(batch)).double()


class Stream(nn.Module):
    """A residual stream, of which subclasses compute more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 9), nn.ReLU(), nn.Linear(9, WIDTH))
        self.add_layers()

    def add_layers(self) -> None:
        pass

    def stream(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.mlp(x)
        return x.relu()


class DroppedNorm(Stream):
    """As transformers' DPT: the norm's result is given back on demand."""

    def add_layers(self) -> None:
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, normed: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stream(x)
        y = self.norm(x)
        return (self.head(x), y) if normed else self.head(x)


class DroppedHead(Stream):
    """As transformers' UperNet without labels; its batch norm learns in training all the same."""

    def add_layers(self) -> None:
        self.norm = nn.BatchNorm1d(WIDTH)
        self.aux = nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stream(x)
        self.aux(self.norm(x.mT).mean(2))
        return self.head(x)


class OfTraining(Stream):
    """Heads that only training runs, as in GoogLeNet."""

    def add_layers(self) -> None:
        self.aux = nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stream(x)
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)

    def auxiliary(self, x: Tensor) -> Tensor:
        y: Tensor = self.aux(x)
        return y


class OfEvaluation(OfTraining):
    """The other way round: training goes without the last layers."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stream(x)
        return self.head(x) if self.training else (self.head(x), self.auxiliary(x))


class Returnless(OfTraining):
    """As timm's LeViT: train() gives nothing back."""

    def add_layers(self) -> None:
        super().add_layers()
        self.gate = Gate()

    def stream(self, x: Tensor) -> Tensor:
        y: Tensor = self.gate(super().stream(x))
        return y


class Gate(nn.Module):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


class Noisy(Stream):
    """Training scales the stream by something learnt."""

    def add_layers(self) -> None:
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stream(x)
        y: Tensor = self.head(x * self.scale.tanh() if self.training else x)
        return y


class DroppedMaps(Stream):
    """Attention maps, averaged over heads and dropped, as in an attention pooling."""

    def add_layers(self) -> None:
        self.pool = nn.MultiheadAttention(WIDTH, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stream(x)
        y: Tensor = self.head(self.pool(x, x, x)[0])
        return y


class DroppedDeep(Stream):
    """A head with a batch norm within, dropped where the forward has to be rewritten."""

    def add_layers(self) -> None:
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.aux = nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stream(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        self.aux(x.mean(1))
        y: Tensor = self.head(x)
        return y


class Heads(OfTraining):
    """Training sees three heads where evaluation sees a stream."""

    def add_layers(self) -> None:
        self.aux = nn.Linear(4, 3)

    def auxiliary(self, x: Tensor) -> Tensor:
        y: Tensor = self.aux(x.unflatten(-1, (3, 4)).sum(2))
        return y


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = OfTraining()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y: Tensor | tuple[Tensor, Tensor] = self.inner(x)
        return y


class Features(OfTraining):
    """Training gives back the stream itself."""

    def add_layers(self) -> None:
        pass

    def auxiliary(self, x: Tensor) -> Tensor:
        return x


class Sums(Features):
    """What training sums over does not vanish with its units."""

    def auxiliary(self, x: Tensor) -> Tensor:
        return x.exp().sum(-1)


class Cosine(OfTraining):
    """A classifier on normalised weights, in training alone."""

    def add_layers(self) -> None:
        self.aux = nn.Linear(WIDTH, 3)

    def auxiliary(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.aux.weight, dim=1))


class NeverCalled(Stream):
    """Parameters of another method, and a token that no example uses."""

    def add_layers(self) -> None:
        self.token, self.other = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.stream(x)
        x = x if mask is None else torch.where(mask, self.token, x)
        y: Tensor = self.head(x)
        return y

    def project(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(self.stream(x))
        return y


def cut(
    kind: Callable[[], nn.Module], seed: int, training: bool = False
) -> tuple[nn.Module, depgraph.DependencyGraph, depgraph.Plan, nn.Module]:
    model = randomise(kind()).double().train(training)
    graph = depgraph.trace(model, example())
    plan = graph.plan(random_units(graph, seed))
    return model, graph, plan, plan.apply(model)


def frozen_of(graph: depgraph.DependencyGraph, parameter: str, dim: int) -> str | None:
    for group in graph.groups:
        if any((m.parameter, m.dim) == (parameter, dim) for m in group.members):
            return group.frozen
    raise AssertionError(parameter)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        OfTraining,
        OfEvaluation,
        Returnless,
        Noisy,
        Heads,
        Nested,
        DroppedNorm,
        DroppedHead,
        DroppedDeep,
        DroppedMaps,
    ],
)
def test_both_modes_are_exact_after_a_cut_in_either(kind: type[nn.Module], training: bool) -> None:
    for seed in range(3):
        model, graph, plan, small = cut(kind, seed, training)
        assert len(graph.prunable) >= 2
        assert plan.num_params == sum(p.numel() for p in small.parameters())
        for mode in (False, True):
            for batch in (2, 3):
                expected = masked(model, plan).train(mode)(example(batch))
                got = copy.deepcopy(small).train(mode)(example(batch))
                pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else ()
                assert isinstance(got, tuple) == isinstance(expected, tuple)
                for a, b in pairs or [(got, expected)]:
                    assert relative_difference(a, b) < 1e-9


def test_what_training_alone_runs_reads_the_units_that_stay() -> None:
    _, graph, plan, _ = cut(OfTraining, 0)
    assert frozen_of(graph, "stem.weight", 0) is None
    assert torch.equal(plan.kept["stem.weight"][0], plan.kept["aux.0.weight"][1])
    assert "depends on 'aux.0.weight'" in str(frozen_of(graph, "aux.0.weight", 0))
    assert 0 not in plan.kept.get("aux.2.weight", {})


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Features, "outputs"), (Sums, "does not vanish"), (Cosine, "normalises a weight")],
)
def test_training_freezes_what_it_could_not_do_without(kind: type[nn.Module], reason: str) -> None:
    model, graph, plan, small = cut(kind, 0)
    assert reason in str(frozen_of(graph, "stem.weight", 0))
    assert frozen_of(graph, "mlp.0.weight", 0) is None
    for a, b in zip(small.train()(example()), masked(model, plan).train()(example()), strict=True):
        assert relative_difference(a, b) < 1e-9


def test_heads_that_only_training_sees_tell_their_groups_apart() -> None:
    graph = cut(Heads, 0)[1]
    assert {group.size for group in graph.prunable} == {3, 4, 9}


def test_a_mean_whose_result_is_dropped_freezes_nothing() -> None:
    for training in (False, True):
        graph = cut(DroppedMaps, 0, training)[1]
        assert {group.size for group in graph.prunable} == {WIDTH, 3, 4, 9}


def test_a_norm_whose_result_is_dropped_follows_the_stream() -> None:
    model, graph, plan, small = cut(DroppedNorm, 0)
    assert frozen_of(graph, "stem.weight", 0) is None
    assert small.norm.normalized_shape == (len(plan.kept["stem.weight"][0]),)
    for a, b in zip(
        small(example(3), normed=True), masked(model, plan)(example(3), normed=True), strict=True
    ):
        kept = plan.kept["stem.weight"][0]
        assert relative_difference(a, b if a.shape == b.shape else b[..., kept]) < 1e-9


def test_statistics_of_a_dropped_result_are_learnt_as_in_the_original() -> None:
    model, _, plan, small = cut(DroppedHead, 0)
    whole = masked(model, plan).train()
    for batch in (2, 3):
        small.train()(example(batch)).sum().backward()
        whole(example(batch))
    kept = plan.kept["stem.weight"][0]
    assert torch.allclose(small.norm.running_var, whole.norm.running_var[kept])
    assert small.norm.num_batches_tracked == 2
    assert all(p.grad is not None for p in small.mlp.parameters())


def test_parameters_that_nothing_reads_stay_whole_with_that_reason() -> None:
    _, graph, plan, small = cut(NeverCalled, 1)
    assert frozen_of(graph, "stem.weight", 0) is None
    for name in ("token", "other.weight"):
        dim = small.get_parameter(name).dim() - 1
        assert frozen_of(graph, name, dim) == (
            f"nothing that the traced forward returns depends on '{name}'"
        )
        assert name not in plan.kept
    assert small.other.weight.shape == (7, WIDTH)


class AtAnotherCall(Stream):
    """A layer of calls that are not like the example, or no layer."""

    does: Callable[[Tensor], bool]

    def add_layers(self) -> None:
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        other = type(self).does(x)
        x = self.stream(x)
        x = x + self.second(x) * self.scale if other else self.first(x)
        y: Tensor = self.head(x)
        return y


class Within(nn.Module):
    """The same in a module of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


OTHER_CALLS: dict[str, Callable[[Tensor], bool]] = {
    "a batch of one": lambda x: len(x) == 1,
    "a larger batch": lambda x: len(x) > 2,
    "fewer tokens": lambda x: x.shape[1] < 4,
    "more tokens": lambda x: x.shape[1] > 5,
    "an even number of tokens": lambda x: x.shape[1] % 2 == 0,
    "another type": lambda x: x.dtype == torch.float32,
    "gradients": lambda x: torch.is_grad_enabled(),
}


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("call", OTHER_CALLS)
def test_layers_of_another_call_follow_the_cut(call: str, within: bool) -> None:
    kind = type("Kind", (AtAnotherCall,), {"does": staticmethod(OTHER_CALLS[call])})
    model, _, plan, small = cut(lambda: Within(kind()) if within else kind(), 0)
    prefix = "inner." if within else ""
    assert torch.equal(plan.kept[f"{prefix}stem.weight"][0], plan.kept[f"{prefix}second.weight"][1])
    was = masked(model, plan)
    for batch, tokens in ((1, 5), (2, 5), (4, 5), (2, 3), (2, 10), (2, 6)):
        x = torch.randn(batch, tokens, 8).double()
        assert relative_difference(small(x), was(x)) < 1e-9
        with torch.no_grad():
            assert relative_difference(small(x), was(x)) < 1e-9
    x = example().float()
    got, expected = copy.deepcopy(small).float()(x), copy.deepcopy(was).float()(x)
    assert relative_difference(got, expected) < 1e-5


class Skipping(AtAnotherCall):
    """Other calls leave a layer out, or tell heads apart."""

    def forward(self, x: Tensor) -> Tensor:
        other = type(self).does(x)
        x = self.first(self.stream(x))
        x = x.unflatten(-1, (3, 4)).flip(-2).flatten(-2) if other else self.second(x) * self.scale
        y: Tensor = self.head(x)
        return y


@pytest.mark.parametrize(
    "call", ["a batch of one", "a larger batch", "more tokens", "an even number of tokens"]
)
def test_what_another_batch_or_size_couples_holds(call: str) -> None:
    kind = type("Kind", (Skipping,), {"does": staticmethod(OTHER_CALLS[call])})
    for seed in range(3):
        model, graph, plan, small = cut(kind, seed)
        assert {group.size for group in graph.prunable} == {WIDTH, 4, 9}
        was = masked(model, plan)
        for batch, tokens in ((1, 5), (2, 5), (3, 5), (5, 5), (2, 3), (2, 8), (2, 9)):
            x = torch.randn(batch, tokens, 8).double()
            assert relative_difference(small(x), was(x)) < 1e-9


class Positions(Stream):
    """Tables of more positions than the example has tokens, one of them computed first."""

    def add_layers(self) -> None:
        self.first, self.last = nn.Parameter(torch.randn(9, WIDTH)), nn.Parameter(torch.randn(9, 1))

    def forward(self, x: Tensor) -> Tensor:
        number = x.shape[1]
        y: Tensor = self.head(self.stream(x) + self.first.tanh()[:number] * self.last[-number:])
        return y


def test_entries_that_the_example_leaves_out_are_there_for_longer_sequences() -> None:
    model, graph, plan, small = cut(Positions, 0)
    reason = "nothing that the traced forward returns depends on these entries of"
    for name in ("first", "last"):
        assert f"{reason} '{name}'" in [group.frozen for group in graph.groups]
    assert set(plan.kept["first"]) == {1}
    for tokens in (3, 5, 9):
        x = torch.randn(2, tokens, 8).double()
        assert relative_difference(small(x), masked(model, plan)(x)) < 1e-9


@pytest.mark.parametrize("scope", ["global", "uniform"])
def test_parameters_that_nothing_reads_do_not_count_in_a_ratio(scope: str) -> None:
    def kept(kind: Callable[[], nn.Module]) -> dict[str, int]:
        torch.manual_seed(0)
        model = kind().double().eval()
        plan = pruners.prune(model, example(), "l2", 0.5, scope=scope)[1]
        return {name: len(units) for name, units in plan.kept_units.items()}

    assert kept(NeverCalled) == kept(type("Plain", (NeverCalled,), {"add_layers": lambda self: 0}))


class Attention(nn.Module):
    """Training also adds up the head dims of all heads."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self.both = nn.Linear(8, 36), nn.Linear(12, 3), both

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        out = self.proj(y.transpose(1, 2).flatten(2))
        return (out, (y.sum(1) ** 2).sum(-1)) if self.training and self.both else out


def test_heads_whose_dims_only_training_adds_up_keep_the_same_ones() -> None:
    for both in (False, True):
        graph = depgraph.trace(Attention(both).eval(), example().float())
        assert {graph.lead(g.name) is None for g in graph.prunable if g.size == 4} == {both}


class HeadsInTheBatch(nn.Module):
    """A batch norm learns its statistics over all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(8, 12), nn.BatchNorm1d(4), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).unflatten(-1, (3, 4)).flatten(0, 2)
        y = self.norm(y).unflatten(0, (len(x), 5, 3)).flatten(2)
        z: Tensor = self.head(y)
        return z


@pytest.mark.parametrize("training", [False, True])
def test_what_training_takes_statistics_over_stays_whole(training: bool) -> None:
    model = randomise(HeadsInTheBatch()).double().train(training)
    graph = depgraph.trace(model, example())
    (channels,) = graph.prunable
    assert channels.size == 4
    plan = graph.plan({channels.name: [0, 3]})
    small = plan.apply(model)
    for mode in (False, True):
        got, expected = small.train(mode)(example(3)), masked(model, plan).train(mode)(example(3))
        assert relative_difference(got, expected) < 1e-9


def test_a_mode_in_which_the_model_does_not_run_says_nothing() -> None:
    class Demands(Stream):
        def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
            if self.training and targets is None:
                raise ValueError("targets are needed")
            y: Tensor = self.head(self.stream(x))
            return y

    small = cut(Demands, 0)[3]
    assert small(example(3)).shape == (3, 5, 3)
