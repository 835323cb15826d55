"""Forwards that read values: of literals, of buffers, of masks and of sizes among their inputs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depgraph
from tests.interpret import masked_outputs
from tests.reference import relative_difference, switched_off


class Net(nn.Module):
    """Two layers, and what comes between the input and them."""

    def __init__(self, before: Callable[..., Tensor]) -> None:
        super().__init__()
        self.before = before
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)
        self.register_buffer("steps", torch.tensor([2, 0, 1]))

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        h: Tensor = self.second(torch.relu(self.first(self.before(self, x, *more))))
        return h


def check_half(model: nn.Module, inputs: tuple[Any, ...], others: tuple[Any, ...] = ()) -> None:
    """Half of each group may go, exactly; and the sliced model runs on other inputs as well."""
    graph = depgraph.trace(model.eval(), inputs)
    assert graph.prunable
    plan = graph.plan({group.name: range(group.size // 2) for group in graph.prunable})
    small = plan.apply(model)
    again = depgraph.Plan.from_json(plan.to_json()).apply(model)
    with torch.no_grad():
        (expected,) = masked_outputs(graph, plan, model, inputs)
        assert relative_difference(small(*inputs), expected) < 1e-5
        assert torch.equal(again(*inputs), small(*inputs))
        if others:
            small(*others)


def test_a_forward_is_traced_as_it_runs_on_the_models_device() -> None:
    def before(net: Any, x: Tensor) -> Tensor:
        counts = x.argmax(-1).float() if x.device.type == "cpu" else x.argmax(-1).int()
        assert str(x.device) == str(net.first.weight.device) == "cpu"
        return x * torch.histc(counts, 8, 0, 7)

    check_half(Net(before), (torch.randn(2, 8),))


LITERALS: tuple[Callable[..., Tensor], ...] = (
    lambda net, x: x - torch.tensor([0.5] * 8, device=x.device),
    lambda net, x: x - torch.tensor(0.5, device=x.device),
    lambda net, x: x - torch.as_tensor([0.5] * 8, dtype=x.dtype, device=x.device),
    lambda net, x: x - torch.asarray([0.5] * 8, device=x.device),
    lambda net, x: x - torch.as_tensor(np.full(8, 0.5, np.float32), device=x.device),
    lambda net, x: x - x.new_tensor([0.5] * 8),
    lambda net, x: x[:, torch.tensor([7, 6, 5, 4, 3, 2, 1, 0], device=x.device)],
    lambda net, x: x * torch.tensor([float(net.steps[0]), 2.0], device=x.device)[0],
)


@pytest.mark.parametrize("before", LITERALS)
def test_a_literal_on_the_inputs_device_is_traced(before: Callable[..., Tensor]) -> None:
    check_half(Net(before), (torch.randn(2, 8),), (torch.randn(5, 8),))


def _window(net: Any, x: Tensor, sizes: Tensor) -> Tensor:
    """The rows of each of several sequences, less their mean."""
    parts = x.split(sizes.tolist())
    return torch.cat([part - part.mean(0) for part in parts])


READING: tuple[tuple[Callable[..., Tensor], tuple[Tensor, ...]], ...] = (
    (lambda net, x: x if net.steps[0] > 0 else x.flip(0), ()),
    (lambda net, x: x * int(net.steps.max()), ()),
    (lambda net, x, mask: x if mask.all() else x * mask[:, None], (torch.ones(6).long(),)),
    (lambda net, x, mask: x if (mask == 1).all() else x * mask[:, None], (torch.ones(6),)),
    (_window, (torch.tensor([4, 2]),)),
    (
        lambda net, x, sizes: (
            x + torch.arange(2.0).repeat_interleave(sizes, output_size=len(x))[:, None]
        ),
        (torch.tensor([4, 2]),),
    ),
    (
        lambda net, x, sizes: x + torch.arange(2.0).repeat_interleave(sizes)[:, None],
        (torch.tensor([4, 2]),),
    ),
    (lambda net, x, mask: x[mask], (torch.tensor([True, True, False, True, True, False]),)),
    (lambda net, x, index: x[index.unique()], (torch.tensor([3, 3, 1]),)),
    (lambda net, x, mask: x[mask.nonzero().flatten()], (torch.tensor([1, 0, 1, 0, 1, 1]),)),
)


@pytest.mark.parametrize(("before", "more"), READING)
def test_values_that_say_how_to_read_the_input_are_read(
    before: Callable[..., Tensor], more: tuple[Tensor, ...]
) -> None:
    check_half(Net(before), (torch.randn(6, 8), *more))


def test_a_value_written_in_place_is_read_as_it_is_then() -> None:
    def before(net: Any, x: Tensor, sizes: Tensor) -> Tensor:
        ends = x.new_zeros(3, dtype=torch.long)
        ends[1:] = sizes.cumsum(0)
        first = ends[1:2]
        assert int(first) == 4
        ends.add_(1)
        assert int(first) == 5
        return x[: int(first)]

    check_half(Net(before), (torch.randn(6, 8), torch.tensor([4, 2])))


def test_what_was_read_is_recorded() -> None:
    model = Net(lambda net, x, mask: x if mask.all() and net.steps[0] > 0 else x.flip(0))
    traced = depgraph.trace(model, (torch.randn(6, 8), torch.ones(6).long())).traced
    first, second = traced.reads
    assert (first.answer, second.answer) == (True, True)
    assert (first.inputs, second.inputs) == (frozenset(traced.inputs[1:]), frozenset())
    assert first.source.startswith("test_values.py, line ")


def test_a_buffer_whose_values_are_read_stays_whole() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)
            self.register_buffer("scale", torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            if not torch.equal(self.scale, torch.ones_like(self.scale)):
                h = h * self.scale
            y: Tensor = self.second(h + self.scale)
            return y

    graph = depgraph.trace(Scaled(), torch.randn(2, 8))
    (scaled,) = (g for g in graph.groups if any(m.parameter == "first.bias" for m in g.members))
    assert "values are read" in str(scaled.frozen)


CHECKS: tuple[Callable[..., None], ...] = (
    lambda h: _complain("not finite") if not torch.isfinite(h).all() else None,
    lambda h: _complain("too large") if (h.abs() > 1e6).any().item() else None,
    lambda h: _complain("none") if torch.equal(h, h + 1) else None,
)


def _complain(text: str) -> None:
    raise ValueError(text)


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_of_activations_is_taken_to_pass(check: Callable[..., None]) -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            check(h)
            y: Tensor = self.second(h)
            check(y)
            return y

    check_half(Checked(), (torch.randn(2, 8),), (torch.randn(5, 8),))


def test_a_branch_on_activations_is_refused_by_the_models_own_line() -> None:
    model = Net(lambda net, x: x if x.sum() > 0 else x.flip(0))
    with pytest.raises(depgraph.DepgraphError, match=r"test_values.py, line \d+.*torch.where"):
        depgraph.trace(model, torch.randn(2, 8))


class Detector(nn.Module):
    """Picks what scores best, as detectors do, after layers on images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.neck = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)
        self.scores, self.boxes = nn.Conv2d(12, 1, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.neck(self.stem(x).relu()).relu()
        scores, boxes = self.scores(h).flatten(1), self.boxes(h).flatten(2).mT
        found = []
        for score, box in zip(scores, boxes, strict=True):
            good = torch.where(score > 0)[0]
            order = score[good].argsort(descending=True)[:5]
            found.append(box[good][order])
        return found


def test_layers_before_a_choice_that_the_data_makes_are_cut_exactly() -> None:
    model, x = Detector().eval(), torch.randn(2, 3, 9, 9)
    graph = depgraph.trace(model, x)
    assert sorted(group.size for group in graph.prunable) == [8, 12]
    plan = graph.plan({group.name: range(group.size // 2) for group in graph.prunable})
    small, expected = plan.apply(model), switched_off(model, plan)
    for other in (x, torch.randn(3, 3, 8, 11)):
        for found, wanted in zip(small(other), expected(other), strict=True):
            assert found.shape == wanted.shape
            assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(("along", "free"), [("rows", True), ("entries", False)])
def test_what_a_mask_picks_from_stays_whole_along_the_mask_alone(along: str, free: bool) -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            y: Tensor = self.second(h[x[:, 0] > 0]) if along == "rows" else h[h > 0]
            return y

    graph = depgraph.trace(Picks(), torch.randn(6, 8))
    assert [group.size for group in graph.prunable] == ([16] if free else [])
    reasons = [str(group.frozen) for group in graph.groups]
    assert free or any("picks entries of it" in reason for reason in reasons)


def test_a_value_of_what_the_data_picked_is_not_known() -> None:
    model = Net(lambda net, x: x[x[:, 0] > 0] * int(torch.ones_like(x[x[:, 0] > 0]).sum()))
    with pytest.raises(depgraph.DepgraphError, match=r"test_values.py, line \d+"):
        depgraph.trace(model, torch.randn(4, 8))


class Masked(nn.Module):
    """Does something else to its hidden units under a mask that leaves something out."""

    def __init__(self, beyond: Callable[..., Tensor]) -> None:
        super().__init__()
        self.beyond = beyond
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)
        self.third = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.first(x).relu()
        if not mask.all():
            h = self.beyond(self, h) * mask[:, None]
        y: Tensor = self.second(h)
        return y


BEYOND: tuple[tuple[Callable[..., Tensor], bool], ...] = (
    (lambda net, h: h, True),
    (lambda net, h: net.third(h), True),
    (lambda net, h: h - h.mean(-1, keepdim=True) ** 2, False),
    (lambda net, h: h.cumsum(-1), False),
)


@pytest.mark.parametrize(("beyond", "free"), BEYOND)
def test_the_branch_that_another_mask_takes_fits_a_cut_too(
    beyond: Callable[..., Tensor], free: bool
) -> None:
    model, x, ones = Masked(beyond).eval(), torch.randn(4, 8), torch.ones(4).long()
    graph = depgraph.trace(model, (x, ones))
    assert bool(graph.prunable) == free
    plan = graph.plan({group.name: range(group.size // 2) for group in graph.prunable})
    small, expected = plan.apply(model), switched_off(model, plan)
    for mask in (ones, torch.tensor([1, 0, 1, 1])):
        assert relative_difference(small(x, mask), expected(x, mask)) < 1e-5


def test_a_loop_on_a_mask_ends() -> None:
    def before(net: Any, x: Tensor, mask: Tensor) -> Tensor:
        while mask.any():
            x, mask = x + 1, mask[1:] * 0
        return x

    check_half(Net(before), (torch.randn(6, 8), torch.ones(6).long()))


class Windows(nn.Module):
    """Attends within windows, of which a tensor says the ends; its forward has a width in it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 36), nn.Linear(12, 8)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), 3, 3, 4).permute(1, 2, 0, 3)
        lengths = (ends[1:] - ends[:-1]).tolist()
        parts = zip(*(t.split(lengths, 1) for t in (q, k, v)), strict=True)
        y = torch.cat([nn.functional.scaled_dot_product_attention(*part) for part in parts], 1)
        result: Tensor = self.proj(y.transpose(0, 1).flatten(1))
        return result


class Packed(nn.Module):
    """Computes the ends of windows from their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.windows = nn.Linear(8, 8), Windows()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        ends = nn.functional.pad(lengths.cumsum(0), (1, 0))
        result: Tensor = self.windows(self.first(x), ends)
        return result


def test_a_rewritten_forward_reads_what_the_model_computed_from_a_known_input() -> None:
    model, lengths = Packed().eval(), torch.tensor([2, 4])
    graph = depgraph.trace(model, (torch.zeros(6, 8), lengths))
    plan = graph.plan({group.name: range(group.size - 1) for group in graph.prunable})
    small, expected = plan.apply(model), switched_off(model, plan)
    assert "depgraph_rewrite" in vars(type(small.windows))
    for other in (lengths, torch.tensor([4, 2]), torch.tensor([1, 2, 3, 3])):
        x = torch.randn(int(other.sum()), 8)
        assert relative_difference(small(x, other), expected(x, other)) < 1e-5


@pytest.mark.parametrize("rewritten", [False, True])
def test_a_tensor_that_is_reshaped_in_place_had_another_shape_before(rewritten: bool) -> None:
    class InPlace(Net):
        def forward(self, x: Tensor, *more: Tensor) -> Tensor:
            hidden = self.first(x)
            if rewritten:
                hidden = hidden.reshape(len(x), 16)
            one = torch.relu(hidden)
            one.unsqueeze_(1)
            result: Tensor = self.second(torch.relu(hidden)) + self.second(one).squeeze(1)
            return result

    check_half(InPlace(lambda net, x: x), (torch.randn(3, 8),), (torch.randn(5, 8),))
