"""Hooks run after a cut as on the original; those that only look on never see a trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.tracing.hooks import only_looks_on
from tests.reference import masked, randomise, relative_difference

SEEN: list[Any] = []
BY_NAME: dict[str, Any] = {}


def example(batch: int = 2) -> Tensor:
    return torch.randn(batch, 5, 8, generator=torch.Generator().manual_seed(batch)).double()


class Recorder:
    """Keeps values, as tools do that watch activations."""

    def __init__(self) -> None:
        self.calls, self.largest = 0, 0.0

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.calls += 1
        self.largest = max(self.largest, output.abs().max().item())
        SEEN.append(output.detach().numpy())

    __call__ = hook


def recorded(module: nn.Module, args: Any, output: Tensor) -> None:
    SEEN.append(output.mean().item())


def by_name(module: nn.Module, args: Any, output: Tensor) -> None:
    BY_NAME["last"] = output.detach().numpy()
    SEEN.append(1)


def named(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    BY_NAME[name] = output.detach().numpy()
    SEEN.append(name)


def early(module: nn.Module, args: Any, output: Tensor) -> None:
    if not len(output):
        return
    for row in output:
        SEEN.append(row.sum().item())


OBSERVERS: dict[str, Callable[[], Callable[..., Any]]] = {
    "function": lambda: recorded,
    "into a dict": lambda: by_name,
    "partial": lambda: functools.partial(named, "x"),
    "branches": lambda: early,
    "lambda": lambda: lambda module, args, output: SEEN.append(output.sum().item()),
    "method": lambda: Recorder().hook,
    "object": Recorder,
}


class Attention(nn.Module):
    """Its forward is rewritten after a cut of head dims."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.drop, self.proj = nn.Linear(8, 36), nn.Dropout(0.1), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
        scores = self.drop((q @ k.mT * 0.5).softmax(-1))
        y: Tensor = self.proj((scores @ v).transpose(1, 2).flatten(2))
        return y


def network() -> nn.Module:
    model = nn.Sequential(Attention(), nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 3)))
    return randomise(model).double().eval()


def cut(model: nn.Module) -> tuple[depgraph.Plan, nn.Module]:
    graph = depgraph.trace(model, example())
    plan = graph.plan({g.name: range(0, g.size, 2) for g in graph.prunable})
    return plan, plan.apply(model)


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("name", OBSERVERS)
def test_a_hook_that_looks_on_runs_after_a_cut_alone(name: str, pre: bool) -> None:
    model, hook = network(), OBSERVERS[name]()
    for module in model.modules():
        if pre:
            module.register_forward_pre_hook(
                lambda module, args, hook=hook: SEEN.append(hook(module, args, args[0]))
            )
        else:
            module.register_forward_hook(hook)
    SEEN.clear()
    _, small = cut(model)
    assert not SEEN
    model(example())
    number = len(SEEN)
    SEEN.clear()
    small(example())
    assert len(SEEN) == number > 0


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(2)


def masks(module: nn.Module, args: Any, output: Tensor) -> None:
    output[..., 0] = 0


def adds(module: nn.Module, args: Any, output: Tensor) -> None:
    output += 1


def weighs(module: nn.Module, args: Any, output: Tensor) -> None:
    module.scale = output.sum()


def sets(module: nn.Module, args: Any, output: Tensor) -> None:
    setattr(module, "scale", output.sum())  # noqa: B010


ACTING: dict[str, Callable[..., Any]] = {
    "gives back": double,
    "in place": in_place,
    "writes into": masks,
    "adds to": adds,
    "sets an attribute": weighs,
    "sets it by name": sets,
    "lambda": lambda module, args, output: output + 1,
    "lambda, records too": lambda module, args, output: (SEEN.append(1), output + 1)[1],
    "lambda, a call": lambda module, args, output: torch.relu(output),
    "only sometimes": lambda module, args, output: output if len(output) else None,
}


@pytest.mark.parametrize("name", ACTING)
def test_a_hook_that_changes_something_does_not_only_look_on(name: str) -> None:
    assert not only_looks_on(ACTING[name])
    assert not only_looks_on(functools.partial(ACTING[name]))


@pytest.mark.parametrize("hook", [recorded, by_name, early, Recorder().hook, Recorder(), print])
def test_what_records_only_looks_on(hook: Callable[..., Any]) -> None:
    assert only_looks_on(hook)


def test_a_hook_that_couples_dimensions_is_part_of_the_forward() -> None:
    model = network()
    model[1][0].register_forward_hook(lambda module, args, output: output - output.mean(-1, True))
    graph = depgraph.trace(model, example())
    assert "reduces over it" in str(next(g.frozen for g in graph.groups if g.size == 9))


@pytest.mark.parametrize("hook", [double, in_place])
def test_a_hook_that_scales_does_so_after_a_cut(hook: Callable[..., Any]) -> None:
    model = network()
    for module in (model[0].qkv, model[0].drop, model[1][0], model[1]):
        module.register_forward_hook(hook)
    plan, small = cut(model)
    for batch in (2, 3):
        expected = masked(model, plan)(example(batch))
        assert relative_difference(small(example(batch)), expected) < 1e-9


def counts(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    SEEN.append(output)
    return output * 2


def by_value(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output / output.abs().max().item()


def checks(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    assert not output.is_meta
    return output + torch.arange(output.size(-1))


class Counter(Recorder):
    def hook(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        self.calls += 1
        return output * self.calls


@pytest.mark.parametrize("hook", [counts, by_value, checks, Counter().hook])
@pytest.mark.parametrize("where", ["0.qkv", "0.drop", "1.0", "1"])
def test_a_hook_that_acts_and_can_tell_a_trace_runs_after_a_cut_alone(
    where: str, hook: Callable[..., Any]
) -> None:
    model = network()
    handle = model.get_submodule(where).register_forward_hook(hook)
    SEEN.clear()
    plan, small = cut(model)
    assert not SEEN
    reference, own = masked(model, plan), getattr(hook, "__self__", None)
    results = []
    for net in (small, reference):
        if own is not None:
            own.calls = 0
        results.append([net(example(batch)) for batch in (2, 3)])
    assert not any(isinstance(x, Tensor) and x.is_meta for x in SEEN)
    for got, expected in zip(*results, strict=True):
        assert relative_difference(got, expected) < 1e-9
    handle.remove()


def test_what_a_hook_may_change_is_frozen_with_its_name() -> None:
    model = network()
    model[1][0].register_forward_hook(counts)
    graph = depgraph.trace(model, example())
    assert next(g.frozen for g in graph.groups if g.size == 9) == "a hook of '1.0' may change it"


def test_a_layer_that_torch_keeps_normalised_by_a_hook_is_traced_with_it() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), torch.nn.utils.spectral_norm(nn.Linear(6, 2)))
    graph = depgraph.trace(model.eval(), torch.randn(3, 4))
    assert not graph.prunable


class GradientHook(nn.Module):
    """Doubles a gradient, where there is one, in a forward that has a width in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).view(len(x), 4, 3).tanh().flatten(1)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * 2)
        result: Tensor = self.b(y)
        return result


class WithIdleChildren(nn.Module):
    """Has children whose result is what they take, or is dropped, and a width in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 5)
        self.idle, self.dropped = nn.Identity(), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).view(len(x), 4, 3).tanh().flatten(1)
        y = y + self.idle(y)
        self.dropped(y)
        result: Tensor = self.b(self.idle(y))
        return result


def test_hooks_of_children_that_compute_nothing_run_in_a_rewritten_forward() -> None:
    small, reference = cut_by_half(WithIdleChildren().double().eval())
    for batch in (2, 3):
        seen: list[list[str]] = [[], []]
        handles = [
            module.register_forward_hook(
                lambda module, args, output, to=names, name=name: to.append(name)
            )
            for network, names in zip((small, reference), seen, strict=True)
            for name, module in network.named_modules()
        ]
        x = torch.randn(batch, 8, dtype=torch.float64)
        torch.testing.assert_close(small(x), reference(x))
        assert seen[0] == seen[1] == ["a", "idle", "dropped", "idle", "b", ""]
        for handle in handles:
            handle.remove()


def test_a_later_hook_that_lets_an_idle_child_give_something_else_is_refused() -> None:
    small, _ = cut_by_half(WithIdleChildren().double().eval())
    small.get_submodule("idle").register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(depgraph.DepgraphError, match="'idle' of a WithIdle"):
        small(torch.randn(2, 8, dtype=torch.float64))


def cut_by_half(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    graph = depgraph.trace(model, torch.zeros(2, 8).double())
    plan = graph.plan({group.name: range(0, group.size, 2) for group in graph.prunable})
    return plan.apply(model), masked(model, plan)


class AsksForGradients(nn.Module):
    """Decides by what needs gradients, in a forward that has a width in it."""

    def __init__(self, asked: Callable[[Tensor, Tensor], bool]) -> None:
        super().__init__()
        self.a, self.b, self.asked = nn.Linear(8, 12), nn.Linear(12, 5), asked

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).view(len(x), 4, 3).tanh().flatten(1)
        result: Tensor = self.b(y * 2 if self.asked(x, y) else y)
        return result


ASKED: dict[str, Callable[[Tensor, Tensor], bool]] = {
    "an input": lambda x, y: x.requires_grad,
    "whether an input is a leaf": lambda x, y: x.is_leaf,
    "what was computed": lambda x, y: y.requires_grad,
    "what was detached": lambda x, y: (y.detach() + 1).requires_grad,
}


@pytest.mark.parametrize("name", ASKED)
def test_what_needs_gradients_is_asked_anew_at_every_call_of_a_rewritten_forward(name: str) -> None:
    small, reference = cut_by_half(AsksForGradients(ASKED[name]).double().eval())
    x = torch.randn(3, 8, dtype=torch.float64)
    for trained in (True, False):
        for network in (small, reference):
            network.requires_grad_(trained)
        for given in (x, x.clone().requires_grad_(), x.clone().requires_grad_() * 1.0):
            torch.testing.assert_close(small(given), reference(given))
            with torch.no_grad():
                torch.testing.assert_close(small(given), reference(given))


def test_a_gradient_hook_in_a_forward_that_is_rewritten_is_not_lost_in_silence() -> None:
    model = GradientHook().eval()
    graph = depgraph.trace(model, torch.zeros(2, 8))
    plan = graph.plan({group.name: range(0, group.size, 2) for group in graph.prunable})
    with pytest.raises(depgraph.DepgraphError, match="register a hook"):
        plan.apply(model)
