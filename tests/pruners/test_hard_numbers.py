"""Numbers that leave nothing to divide by or to invert: a result, or one clear sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import depgraph
import pruners
from pruners.refitting.fit import Fit
from pruners.registry import Batch
from pruners.statistics.finite import is_finite
from pruners.statistics.solving import roots, solve_moments

Change = Callable[[nn.Module], object]


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        depth=1,
        embed_dim=12,
        num_heads=2,
        num_classes=3,
    ).eval()


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    ).eval()


MODELS = {"vit": vit, "convolutions": convolutions}
IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def batches(inputs: Tensor, size: int = 3) -> list[Batch]:
    labels = torch.arange(len(inputs)) % 3
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def last(model: nn.Module) -> nn.Linear:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def zero_head(model: nn.Module) -> None:
    last(model).weight.zero_()
    last(model).bias.zero_()


def all_equal(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.fill_(0.1)


def all_zero(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.zero_()


def duplicated(model: nn.Module) -> None:
    for parameter in model.parameters():
        half = len(parameter) // 2
        parameter[half : 2 * half] = parameter[:half]


HARD: dict[str, tuple[Change, list[Batch]]] = {
    "one image": (lambda model: None, batches(IMAGES[:1])),
    "constant images": (lambda model: None, batches(torch.full((6, 3, 16, 16), 0.7))),
    "black images": (lambda model: None, batches(torch.zeros(6, 3, 16, 16))),
    "zero head": (zero_head, batches(IMAGES)),
    "all weights equal": (all_equal, batches(IMAGES)),
    "all weights zero": (all_zero, batches(IMAGES)),
    "duplicated channels": (duplicated, batches(IMAGES)),
}


def changed(make: Callable[[], nn.Module], change: Change) -> nn.Module:
    model = make()
    with torch.no_grad():
        change(model)
    return model


@pytest.mark.parametrize("metric", pruners.METRICS)
def test_scores_are_finite_where_nothing_tells_units_apart(metric: str) -> None:
    for make in MODELS.values():
        graph = depgraph.trace(make(), IMAGES[:2])
        for name, (change, data) in HARD.items():
            scores = pruners.score(changed(make, change), graph, metric, data)
            assert all(torch.as_tensor(values).isfinite().all() for values in scores.values()), name


@pytest.mark.parametrize("metric", pruners.METRICS)
@pytest.mark.parametrize("name", ["one image", "black images", "zero head", "all weights equal"])
def test_any_metric_prunes_and_compensates_where_nothing_tells_units_apart(
    name: str, metric: str
) -> None:
    change, data = HARD[name]
    model = changed(vit, change)
    small, plan = pruners.prune(model, IMAGES[:2], metric, 0.5, batches=data)
    assert is_finite(small(IMAGES))
    assert plan.num_params < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", HARD)
def test_a_compensated_model_is_finite_and_no_worse_than_one_that_is_not(
    name: str, model: str
) -> None:
    change, data = HARD[name]
    dense = changed(MODELS[model], change)
    inputs = torch.cat([x for x, _ in data])
    errors = []
    for compensate in (True, False):
        small, _ = pruners.prune(dense, IMAGES[:2], "l2", 0.5, batches=data, compensate=compensate)
        assert all(map(is_finite, small.state_dict().values()))
        assert is_finite(small(IMAGES))
        errors.append((small(inputs) - dense(inputs)).norm().item())
    assert errors[0] <= errors[1] + 1e-5


@pytest.mark.parametrize("metric", pruners.METRICS)
def test_weights_that_are_not_finite_are_refused_by_name(metric: str) -> None:
    model = vit()
    model.blocks[0].mlp.fc1.weight.data[0, 0] = float("nan")
    data, named = batches(IMAGES), r"'blocks\.0\.mlp\.fc1\.weight' holds NaN"
    for compensate in (True, False):
        with pytest.raises(depgraph.DepgraphError, match=named):
            pruners.prune(model, IMAGES[:2], metric, batches=data, compensate=compensate)
    with pytest.raises(depgraph.DepgraphError, match=named):
        pruners.score(model, depgraph.trace(model, IMAGES[:2]), metric, data)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_one_number_among_many_is_found_in_any_precision(value: float, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)
    model[2].bias.data[1] = value
    with pytest.raises(depgraph.DepgraphError, match=r"parameter '2\.bias' holds NaN or infinite"):
        pruners.prune(model, torch.randn(2, 3, dtype=dtype), "random")


@pytest.mark.parametrize("metric", pruners.METRICS)
def test_pixels_that_are_not_finite_are_refused_by_batch_and_sample(metric: str) -> None:
    images = IMAGES.clone()
    images[4, 0, 0, 0] = float("inf")
    images[5] = float("nan")
    for compensate in (True, False):
        if compensate or pruners.METRICS[metric].needs_data:
            with pytest.raises(depgraph.DepgraphError, match=r"inputs of batch 1 .*sample 1 of"):
                pruners.prune(
                    vit(), IMAGES[:2], metric, batches=batches(images), compensate=compensate
                )


def test_a_buffer_with_a_nan_is_refused_by_name() -> None:
    model = convolutions()
    model[1].running_var[2] = float("nan")
    with pytest.raises(depgraph.DepgraphError, match=r"buffer '1\.running_var' holds NaN"):
        pruners.prune(model, IMAGES[:2], "l1")


def test_masks_of_minus_infinity_are_no_broken_numbers() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)
            self.register_buffer(
                "mask", torch.zeros(5, 5).masked_fill(torch.eye(5) > 0, -torch.inf)
            )

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            mixed = (x @ x.mT + self.mask + mask[:, None]).softmax(-1) @ x
            return self.down(self.up(mixed).relu()).mean(1)

    x, mask = torch.randn(6, 5, 4), torch.zeros(6, 5)
    mask[:, 4] = -torch.inf
    data = [((x, mask), torch.arange(6) % 3)]
    small, _ = pruners.prune(Masked().eval(), (x[:2], mask[:2]), "taylor", batches=data)
    assert is_finite(small(x, mask))


@pytest.mark.parametrize(
    "metric", ["taylor", "taylor2", "hessian", "fisher", "gauss_newton", "hutchinson", "obs"]
)
def test_numbers_that_overflow_on_the_way_are_refused(metric: str) -> None:
    model = vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.mul_(1e30)
        model.head.weight.mul_(1e30)
    with pytest.raises(depgraph.DepgraphError, match=r"finite|too large"):
        pruners.prune(model, IMAGES[:2], metric, batches=batches(IMAGES), compensate=False)


def test_compensation_refuses_what_overflows_and_names_the_layer() -> None:
    model = vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(1e30)
    with pytest.raises(depgraph.DepgraphError, match=r"'blocks\.0\..*' reads or gives"):
        pruners.prune(model, IMAGES[:2], "l1", batches=batches(IMAGES))


def test_inputs_without_spread_leave_the_weights_as_they_are() -> None:
    weight, bias = torch.randn(3, 5), torch.randn(3)
    x = torch.full((40, 5), 0.3)
    y = x @ weight.T + bias + 1
    fit = Fit("weight")
    fit.add(x, y)
    got, offset = (part.float() for part in fit.solve(weight, bias, 0.01) if part is not None)
    torch.testing.assert_close(got, weight, rtol=0, atol=1e-4)
    torch.testing.assert_close(x @ got.T + offset, y)


def test_a_singular_system_is_damped_until_it_holds() -> None:
    ones = torch.ones(4, 4).double()
    right = torch.ones(4, 1).double()
    got = solve_moments(ones, right, 1e-30)
    torch.testing.assert_close(ones @ got, right)
    root, inverse = roots(torch.zeros(2, 3, 3).double())
    assert torch.equal(root, torch.eye(3).double().expand(2, 3, 3)) and torch.equal(root, inverse)
