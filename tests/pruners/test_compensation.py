from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depgraph
import pruners
from depgraph import DepgraphError
from pruners.refitting.compensation import compensate
from pruners.refitting.fit import Fit
from tests.depgraph.models import images, tiny
from tests.reference import randomise, state


def batches(samples: int = 64) -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.zeros(len(x), dtype=torch.long)) for x in images(samples).split(16)]


def fitted(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, damping: float, size: int = 7
) -> tuple[Tensor, Tensor | None]:
    fit = Fit("weight")
    for rows, wanted in zip(x.split(size), y.split(size), strict=True):
        fit.add(rows, wanted)
    weight, bias = fit.solve(weight, bias, damping)
    return weight.float(), None if bias is None else bias.float()


def test_least_squares_without_damping_is_the_best_fit() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(50, 4), torch.randn(50, 3)
    weight, bias = fitted(x, y, torch.randn(3, 4), torch.randn(3), damping=0.0)
    best = torch.linalg.lstsq(F.pad(x, (0, 1), value=1.0), y).solution
    torch.testing.assert_close(weight, best[:-1].T, rtol=1e-4, atol=1e-5)
    assert bias is not None
    torch.testing.assert_close(bias, best[-1], rtol=1e-4, atol=1e-5)


def test_strong_damping_keeps_the_weights() -> None:
    x, y, given = torch.randn(50, 4), torch.randn(50, 3), torch.randn(3, 4)
    weight, bias = fitted(x, y, given, None, damping=1e9)
    torch.testing.assert_close(weight, given, rtol=1e-4, atol=1e-5)
    assert bias is None


@pytest.mark.parametrize("biased", [True, False])
def test_a_fit_by_parts_is_that_of_the_whole_far_from_zero_too(biased: bool) -> None:
    torch.manual_seed(0)
    x, given = torch.randn(300, 6) + 1000, torch.randn(3, 6)
    y, bias = x @ torch.randn(3, 6).T + torch.randn(300, 3), torch.randn(3) if biased else None
    whole = fitted(x.double(), y.double(), given.double(), bias, 1e-9, size=300)
    parts = fitted(x, y, given, bias, 1e-9, size=11)
    scale = (y - y.mean(0)).std()
    for now, one in zip(parts, whole, strict=True):
        if now is not None and one is not None:
            torch.testing.assert_close(now, one.float(), rtol=2e-3, atol=float(scale) * 2e-3)


def twins() -> nn.Sequential:
    """Hidden units 4 to 7 do what units 0 to 3 do; units that stay can take over for them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].weight[4:], net[0].bias[4:] = net[0].weight[:4], net[0].bias[:4]
    return net


def test_units_that_others_can_replace_are_removed_at_no_loss() -> None:
    net, x = twins(), torch.randn(200, 5)
    plan = depgraph.trace(net, x[:2]).plan({"hidden": range(4)})
    small = plan.apply(net)
    assert not torch.allclose(small(x), net(x), atol=0.1)
    done = compensate(net, small, plan, [(x, torch.zeros(200))], damping=1e-9)
    assert done == ["2.weight"]
    torch.testing.assert_close(small(x), net(x), rtol=1e-3, atol=1e-4)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)),
        *(nn.Tanh(), nn.Linear(4, 3)),
    )


def test_layers_behind_that_lost_no_input_make_good_what_is_left() -> None:
    net, x = chain(), torch.randn(500, 5)
    graph = depgraph.trace(net, x[:2])
    wide = next(group for group in graph.prunable if group.size == 12)
    plan = graph.plan({wide.name: range(3)})
    small = plan.apply(net)
    before = state(small)
    assert compensate(net, small, plan, [(x, torch.zeros(500))], damping=1e-9) == [
        "4.weight",
        "6.weight",
    ]
    with torch.no_grad():
        read = F.pad(small[:6](x), (0, 1), value=1.0)
        best = read @ torch.linalg.lstsq(read, net(x)).solution
        torch.testing.assert_close(small(x), best, rtol=1e-3, atol=1e-4)
        assert (small(x) - net(x)).norm() > 1e-2
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert torch.equal(state(small)[name], before[name])


class Stream(nn.Module):
    """Three layers that add to what goes past them, two of them scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(4, 12) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(12, 4) for _ in range(3))
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0, -1.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            branch = down(up(x).tanh())
            x = x + branch if number == 0 else branch * self.scale + x
        return x


def test_a_layer_that_adds_to_a_stream_brings_back_what_the_stream_lacks() -> None:
    torch.manual_seed(0)
    net, x = Stream(), torch.randn(600, 4)
    graph = depgraph.trace(net, x[:2])
    first = next(group for group in graph.prunable if group.size == 12)
    plan = graph.plan({first.name: range(2)})
    small = plan.apply(net)
    compensate(net, small, plan, [(x, torch.zeros(600))], damping=1e-9)
    with torch.no_grad():
        drifted = x
        for number, (up, down) in enumerate(zip(small.up, small.down, strict=True)):
            read = F.pad(up(drifted).tanh(), (0, 1), value=1.0)
            before, branch = drifted, down(up(drifted).tanh())
            drifted = drifted + branch if number == 0 else branch * small.scale + drifted
        best = before + read @ torch.linalg.lstsq(read, net(x) - before).solution
    torch.testing.assert_close(small(x), best, rtol=1e-2, atol=1e-3)
    assert (net(x) - before).std() > 0.1


def test_of_readers_alone_the_others_stay_as_they_are() -> None:
    net, x = chain(), torch.randn(500, 5)
    graph = depgraph.trace(net, x[:2])
    wide = next(group for group in graph.prunable if group.size == 12)
    small, plan = pruners.prune(
        *(net, x[:2], "random", 0.5),
        ignore=[group.name for group in graph.prunable if group is not wide],
        batches=[(x, torch.zeros(500))],
        compensate="readers",
    )
    raw = plan.apply(net)
    changed = {name for name, w in raw.named_parameters() if not torch.equal(w, state(small)[name])}
    assert changed == {"4.weight", "4.bias"}


def test_of_few_places_a_layer_that_lost_no_input_learns_nothing() -> None:
    net, x = chain(), torch.randn(40, 5)
    graph = depgraph.trace(net, x[:2])
    wide = next(group for group in graph.prunable if group.size == 12)
    plan = graph.plan({wide.name: range(3)})
    small = plan.apply(net)
    assert compensate(net, small, plan, [(x, torch.zeros(40))]) == ["4.weight"]
    assert torch.equal(state(small)["6.weight"], state(net)["6.weight"])


def test_a_convolution_is_refitted_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2, padding=1)
    )
    with torch.no_grad():
        net[0].weight[4:], net[0].bias[4:] = net[0].weight[:4], net[0].bias[:4]
    x = torch.randn(20, 3, 9, 9)
    graph = depgraph.trace(net, x[:2])
    plan = graph.plan({graph.prunable[0].name: range(4)})
    small = plan.apply(net)
    compensate(net, small, plan, [(x, torch.zeros(20))], damping=1e-9)
    torch.testing.assert_close(small(x), net(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224", "beit_base_patch16_224", "deit_base_distilled_patch16_224"]
)
@pytest.mark.parametrize("kind", ["hidden", "head_dim", "heads", "embed"])
def test_every_kind_comes_nearer_to_the_dense_model(name: str, kind: str) -> None:
    model = randomise(tiny(name))
    before = state(model)
    graph = depgraph.trace(model, images())
    chosen = [group for group in graph.prunable if group.kind == kind]
    plan = graph.plan({group.name: range(0, group.size, 2) for group in chosen})
    raw, refitted = plan.apply(model), plan.apply(model)
    assert compensate(model, refitted, plan, batches())
    x = images(64)
    wanted, was, now = (m(x).detach() for m in (model, raw, refitted))
    assert (now - wanted).norm() < 0.9 * (was - wanted).norm()
    assert all(torch.equal(tensor, before[key]) for key, tensor in state(model).items())
    assert refitted.training is raw.training


def test_fewer_samples_than_inputs_give_finite_weights() -> None:
    net = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 3))
    x = torch.randn(4, 5)
    plan = depgraph.trace(net, x).plan({"hidden": range(30)})
    small = plan.apply(net)
    compensate(net, small, plan, [(x, torch.zeros(4))])
    assert torch.isfinite(small(x)).all()


def test_a_layer_that_is_applied_twice_is_left_as_it_is() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = self.down(self.up(x).relu())
            return x

    net, x = Twice(), torch.randn(9, 4)
    graph = depgraph.trace(net, x)
    group = next(g for g in graph.prunable if g.size == 8)
    plan = graph.plan({group.name: range(4)})
    small = plan.apply(net)
    before = state(small)
    assert compensate(net, small, plan, [(x, torch.zeros(9))]) == []
    assert all(torch.equal(tensor, before[key]) for key, tensor in state(small).items())


def test_a_dense_model_that_fails_raises_its_own_error() -> None:
    class Moody(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            x = super().forward(x)
            if self[0].out_features == 8 and len(x) > 100:
                raise RuntimeError("not today")
            return x

    torch.manual_seed(0)
    net, x = Moody(*twins()), torch.randn(200, 5)
    plan = depgraph.trace(net, x[:2]).plan({"hidden": range(4)})
    net.insert(2, nn.Module())
    with pytest.raises(NotImplementedError):
        compensate(net, plan.apply(Moody(*twins())), plan, [(x, torch.zeros(200))])


def test_without_compensation_the_plan_is_applied_to_the_model_as_it_is() -> None:
    model = tiny()
    small, plan = pruners.prune(model, images(), "l2", 0.5, batches=batches(16), compensate=False)
    cut = plan.apply(model)
    assert all(torch.equal(tensor, state(cut)[key]) for key, tensor in state(small).items())


def test_where_there_are_batches_the_result_is_compensated() -> None:
    model = randomise(tiny())
    x = images(64)
    kinds = ("hidden", "head_dim")
    cut, plan = pruners.prune(model, images(), "l2", 0.3, kinds=kinds)
    refitted, other = pruners.prune(model, images(), "l2", 0.3, kinds=kinds, batches=batches())
    assert other.macs == pytest.approx(plan.macs, rel=0.1)
    assert (refitted(x) - model(x)).norm() < 0.8 * (cut(x) - model(x)).norm()


def test_compensation_without_data_is_refused() -> None:
    with pytest.raises(DepgraphError, match="compensation needs data"):
        pruners.prune(tiny(), images(), "l2", 0.5, compensate=True)


def test_more_calibration_samples_than_there_are_is_refused() -> None:
    with pytest.raises(DepgraphError, match="64 samples, fewer than num_calibration=65"):
        pruners.prune(tiny(), images(), "l2", 0.5, batches=batches(), num_calibration=65)


def test_one_stream_of_batches_is_read_once() -> None:
    model = tiny()
    stream = iter(batches(32))
    small, _ = pruners.prune(model, images(), "taylor", 0.5, batches=stream, num_calibration=32)
    assert copy.deepcopy(small)(images()).shape == (2, 10)


def test_nothing_of_the_images_activations_outlives_a_cut() -> None:
    def alive() -> dict[int, Tensor]:
        gc.collect()
        return {
            id(thing): thing
            for thing in gc.get_objects()
            if issubclass(type(thing), Tensor) and thing.dim() == 3 and not thing.is_meta
        }

    model = tiny()
    before = alive()  # held, so that no new tensor has the number of one that went
    pruners.prune(model, images(), "l2", 0.5, batches=batches(16))
    assert alive().keys() <= before.keys()
