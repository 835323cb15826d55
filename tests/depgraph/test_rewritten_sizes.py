"""Rewritten forwards with sizes that Python computes: one writing for all, in TorchScript too."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
from tests.reference import random_units, randomise, switched_off

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch.jit.*:FutureWarning")
Middle = Callable[[Tensor, int, int], Tensor]


class Net(nn.Module):
    """Two layers; the width is written between them, and sizes are computed."""

    def __init__(self, middle: Middle) -> None:
        super().__init__()
        self.a, self.b, self.middle = nn.Linear(8, 12), nn.Linear(12, 5), middle

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens = x.shape[:2]
        y = self.a(x).view(batch, tokens, 4, 3).tanh().flatten(2)
        result: Tensor = self.b(self.middle(y, batch, tokens))
        return result


def cut(middle: Middle) -> tuple[nn.Module, nn.Module]:
    model = randomise(Net(middle)).double().eval()
    graph = depgraph.trace(model, torch.zeros(2, 6, 8).double())
    plan = graph.plan(random_units(graph, 0, 0.4))
    small = plan.apply(model)
    assert type(small) is not type(model), "a forward of its own"
    return switched_off(model, plan), small


def images(batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, tokens, 8, generator=generator, dtype=torch.float64)


MIDDLES: dict[str, Middle] = {
    "first tokens": lambda y, batch, tokens: y[:, :4],
    "all tokens of a padded row": lambda y, batch, tokens: F.pad(y, (0, 0, 0, 6 - tokens))[:, :6],
    "ranges": lambda y, batch, tokens: (
        y * torch.arange(1, batch + 1, dtype=y.dtype)[:, None, None] * torch.ones(batch).sum()
    ),
    "tokens shifted by half": lambda y, batch, tokens: y.roll(batch - 1, 0) + y[batch - 1 :],
    "a number to the power": lambda y, batch, tokens: batch ** (y * 0.1),
    "a root": lambda y, batch, tokens: y.view(batch, int(tokens**0.5), -1, 12).mean(2),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_one_torchscript_trace_serves_other_batches(name: str) -> None:
    reference, small = cut(MIDDLES[name])
    with warnings.catch_warnings():
        if name == "a root":  # the original has a number of the trace there, too
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
        script = torch.jit.trace(small, images(2, 6), check_trace=False)
    for batch in (2, 5):
        torch.testing.assert_close(script(images(batch, 6)), reference(images(batch, 6)))


@pytest.mark.parametrize(
    "middle",
    [
        *MIDDLES.values(),
        lambda y, batch, tokens: y[:, : math.ceil(tokens / 2)],
        lambda y, batch, tokens: y * round(tokens / 3),
        lambda y, batch, tokens: y + y[: batch // 2 + 1].mean(0),
        lambda y, batch, tokens: y.tile(batch, 1, 1)[: batch * 2],
        lambda y, batch, tokens: torch.broadcast_to(y[:1], (batch, tokens, 12)),
        lambda y, batch, tokens: y * {"odd": 3.0, f"{tokens % 2}": 2.0}[f"{tokens % 2}"],
        lambda y, batch, tokens: y * {"0": 3.0, "1": 2.0}[str(batch % 2)],
        lambda y, batch, tokens: y * round(tokens / 4, 1),
        lambda y, batch, tokens: y + torch.arange(tokens).type(y.type())[:, None],
        lambda y, batch, tokens: y + torch.ones(tokens, 1).type_as(y) * (y.type()[-12:] == "t"),
    ],
)
def test_other_sizes_give_what_the_original_gives(middle: Middle) -> None:
    reference, small = cut(middle)
    for batch, tokens in ((2, 6), (5, 6), (1, 6), (3, 4), (2, 9)):
        x = images(batch, tokens)
        torch.testing.assert_close(small(x), reference(x))


def test_a_generator_of_random_numbers_is_refused() -> None:
    def middle(y: Tensor, batch: int, tokens: int) -> Tensor:
        drawn = torch.Generator().manual_seed(0)
        return y.index_select(1, torch.randperm(tokens, generator=drawn))

    with pytest.raises(depgraph.DepgraphError, match=r"draws from a torch\.Generator"):
        cut(middle)


class Causal(nn.Module):
    """Attention that is told that its mask is causal, and so reads none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 12), nn.Linear(12, 3)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        result: Tensor = self.head(
            self.attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        )
        return result


def test_a_mask_that_nothing_reads_still_has_its_shape() -> None:
    model = randomise(Causal()).double().eval()
    graph = depgraph.trace(model, images(2, 6))
    plan = graph.plan(random_units(graph, 0, 0.4))
    small, reference = plan.apply(model), switched_off(model, plan)
    for batch, tokens in ((2, 6), (1, 6), (3, 9)):
        x = images(batch, tokens)
        torch.testing.assert_close(small(x), reference(x))


def test_a_torchscript_trace_says_which_size_it_is_for() -> None:
    _, small = cut(lambda y, batch, tokens: y + y[batch // 2])
    with pytest.warns(torch.jit.TracerWarning, match=r"rewritten for calls with .*n0"):
        torch.jit.trace(small, images(2, 6), check_trace=False)
