from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depgraph
from tests.reference import masked, relative_difference

TOKENS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.proj = nn.Linear(12, 12)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 6).permute(2, 0, 3, 1, 4)
        rate = self.drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=rate)
        return self.drop(self.proj(x.transpose(1, 2).flatten(2)))


class Plain(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.attention = Attention(drop)

    def mask(self, x: Tensor) -> Tensor | None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, self.mask(x))


class MasksInTraining(Plain):
    def mask(self, x: Tensor) -> Tensor | None:
        return torch.ones(5, 5, device=x.device).tril() if self.training else None


class Watches(MasksInTraining):
    """Asks another module for its mode."""

    def mask(self, x: Tensor) -> Tensor | None:
        return torch.ones(5, 5, device=x.device).tril() if self.attention.drop.training else None


class Hooked(Plain):
    """A hook decides by the mode, which is not seen where it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.attention.register_forward_pre_hook(self.causal)

    @staticmethod
    def causal(module: nn.Module, args: tuple[Tensor, Tensor | None]) -> tuple[Tensor, ...]:
        x, _ = args
        mask = torch.ones(5, 5, device=x.device).tril()
        return (x, mask) if module.training else (x,)


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return (x, x / 2) if self.training else x


class Sibling(Plain):
    """What a module gives back decides how another one is called."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = Half()

    def mask(self, x: Tensor) -> Tensor | None:
        return (
            torch.ones(5, 5, device=x.device).tril() if isinstance(self.halves(x), tuple) else None
        )


class Normed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(12)

    def mask(self, x: Tensor) -> Tensor | None:
        return self.norm(x.transpose(1, 2)).mean().expand(5, 5)


DIFFERENT = (MasksInTraining, Watches, Hooked, Sibling, Normed)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [Plain, *DIFFERENT])
def test_a_forward_that_depends_on_the_mode_does_so_after_pruning(
    kind: type[Plain], training: bool
) -> None:
    torch.manual_seed(0)
    model = kind().train(training)
    graph = depgraph.trace(model, TOKENS)
    plan = graph.plan({g.name: range(0, g.size, 2) for g in graph.prunable})
    small = plan.apply(model)
    assert small.attention.proj.in_features < 12
    for mode in (False, True):
        expected = masked(model, plan).train(mode)(TOKENS)
        assert relative_difference(small.train(mode)(TOKENS), expected) < 1e-5


def test_drop_out_of_an_attention_works_after_pruning() -> None:
    model = Plain(drop=0.5)
    graph = depgraph.trace(model.eval(), TOKENS)
    small = graph.plan({g.name: range(0, g.size, 2) for g in graph.prunable}).apply(model)
    torch.manual_seed(0)
    assert torch.equal(small(TOKENS), small(TOKENS))
    assert not torch.equal(small.train()(TOKENS), small(TOKENS))


class Bias(nn.Module):
    """Its forward adds what its method gives; both read the number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.num_heads = nn.Parameter(torch.randn(25, 3)), 3

    def get(self) -> Tensor:
        return self.table.view(-1, self.num_heads).unflatten(0, (5, 5)).permute(2, 0, 1)

    def forward(self, scores: Tensor) -> Tensor:
        return scores + self.get()


class Switched(nn.Module):
    """An attention that calls another module's method, or the module as a switch is turned."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.bias = nn.Linear(12, 36), nn.Linear(12, 12), Bias()
        self.fused = True

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, self.bias.get())
        else:
            y = self.bias(q @ k.mT * 4**-0.5).softmax(-1) @ v
        result: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return result


def test_a_switch_that_calls_a_module_whose_method_alone_was_traced() -> None:
    model = Switched().eval()
    graph = depgraph.trace(model, TOKENS)
    plan = graph.plan({group.name: range(group.size - 1) for group in graph.prunable})
    reference, small = masked(model, plan), plan.apply(model)
    for fused in (True, False, True):
        for net in (reference, small):
            net.fused = fused
        torch.testing.assert_close(small(TOKENS), reference(TOKENS))


def test_modules_are_as_ever_after_a_trace() -> None:
    depgraph.trace(Plain(), TOKENS)
    assert "training" not in vars(nn.Module)
    assert nn.Dropout().training
