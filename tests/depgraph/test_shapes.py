import random

import pytest
import torch
from torch import Tensor

from depgraph.tracing.shapes import quick_result, quick_write

aten = torch.ops.aten


def scrambled(shape: list[int], rng: random.Random) -> Tensor:
    """A meta tensor of that shape whose dimensions lie in memory in some other order."""
    order = rng.sample(range(len(shape)), len(shape))
    tensor = torch.empty([shape[i] for i in order], device="meta")
    return tensor.permute([order.index(i) for i in range(len(shape))])


def check(func, *args) -> bool:
    """Whether the quick result was given; fails where it looks unlike torch's."""
    got = quick_result(func, args, {})
    if got is None:
        return False
    expected = func(*args)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    strides = zip(got.shape, got.stride(), expected.stride(), strict=True)
    assert all(mine == theirs for size, mine, theirs in strides if size > 1)
    return True


@pytest.mark.parametrize("seed", range(40))
def test_quick_results_look_like_what_torch_gives_whatever_the_layout(seed: int) -> None:
    rng = random.Random(seed)
    shape = [rng.choice([1, 2, 3, 5]) for _ in range(rng.randint(1, 4))]
    x = scrambled(shape, rng)
    y = scrambled([size if rng.random() < 0.7 else 1 for size in shape], rng)
    assert check(aten.mul.Tensor, x, y) and check(aten.add.Tensor, x, y)
    assert all(check(op.default, x) for op in (aten.relu, aten.gelu, aten.hardswish))
    check(aten.softmax.int, x, -1)
    check(aten.layer_norm.default, x, [shape[-1]])
    check(aten.cat.default, [x, x, y], len(shape) - 1)
    check(aten.mean.dim, x, [-1], rng.random() < 0.5)


@pytest.mark.parametrize("seed", range(40))
def test_quick_results_of_convolutions_and_their_norms_look_like_what_torch_gives(
    seed: int,
) -> None:
    rng = random.Random(seed)
    groups, kernel = rng.choice([1, 2]), [rng.choice([1, 2, 3]), rng.choice([1, 3])]
    x = scrambled([2, 3 * groups, rng.randint(3, 9), rng.randint(3, 9)], rng)
    weight = torch.empty(2 * groups, 3, *kernel, device="meta")
    stride, padding = [rng.choice([1, 2])] * rng.choice([1, 2]), [rng.choice([0, 1])] * 2
    assert check(aten.conv2d.default, x, weight, None, stride, padding, [1, 1], groups)
    v = torch.empty(3 * groups, device="meta")
    assert check(aten.batch_norm.default, x, v, v, v, v, False, 0.1, 1e-5, True)
    assert check(aten.batch_norm.default, x.contiguous(), v, v, v, v, True, 0.1, 1e-5, True)


def test_operands_that_do_not_fit_are_left_to_torch() -> None:
    x, y = torch.empty(2, 3, device="meta"), torch.empty(4, device="meta")
    assert quick_result(aten.add.Tensor, (x, y), {}) is None
    assert quick_result(aten.linear.default, (x, torch.empty(5, 4, device="meta")), {}) is None
    assert not quick_write(aten.add_.Tensor, (x, y), {})
    assert quick_write(aten.relu_.default, (x,), {})
