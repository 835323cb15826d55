from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import depgraph
from depgraph.exporting.export import export_program
from tests.depgraph.models import WrittenOut, images, tiny


def check(model: nn.Module, x: Tensor) -> tuple[set[str], dict[str, int]]:
    """A folded program computes the same on another batch; its ops, and what was folded."""
    model.eval()
    program, counts = export_program(model, x)
    with torch.no_grad():
        for batch in (1, 3):
            y = torch.randn(batch, *x.shape[1:], generator=torch.Generator().manual_seed(batch))
            expected, found = model(y), program.module()(y)
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    return {str(node.target) for node in program.graph.nodes}, counts


def randomised(model: nn.Module) -> nn.Module:
    """The model with no norm, bias or layer scale at its initial value."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.data += 0.2 * torch.rand(tensor.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224", "deit_base_distilled_patch16_224", "beit_base_patch16_224"]
)
def test_a_pruned_transformer_is_the_same_folded_for_any_batch(name: str) -> None:
    extra = {"init_values": 0.5} if not name.startswith("deit") else {}
    model = tiny(name, **extra)
    graph = depgraph.trace(model, images())
    small = graph.plan({g.name: range(0, g.size, 2) for g in graph.prunable}).apply(model)
    ops, counts = check(small, images())
    assert counts["norms"] == 5
    assert "aten.mul.Tensor" not in ops and "aten.dropout.default" not in ops


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 32), ("convnext_atto", 32), ("levit_128s", 224)]
)
def test_batch_norms_and_layer_scales_go_into_convolutions_and_linear_layers(
    name: str, size: int
) -> None:
    model = randomised(timm.create_model(name, num_classes=3))
    ops, counts = check(model, torch.randn(2, 3, size, size))
    assert counts["factors"] > 10
    assert "aten.batch_norm.default" not in ops or name == "levit_128s"


def test_an_attention_scale_goes_into_the_layer_that_makes_q() -> None:
    class Scaled(WrittenOut):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 4, 6).permute(2, 0, 3, 1, 4)
            attention = ((q * 6**-0.5) @ k.transpose(-1, -2)).softmax(-1)
            return x + self.proj((attention @ v).transpose(1, 2).reshape(x.shape[0], -1, 24))

    ops, counts = check(Scaled(), torch.randn(2, 5, 24))
    assert counts == {"factors": 1} and "aten.mul.Tensor" not in ops


def test_a_branch_of_which_nothing_is_left_becomes_its_bias() -> None:
    model = tiny(init_values=0.5)
    graph = depgraph.trace(model, images())
    none = dict.fromkeys(("blocks.0.mlp.hidden", "blocks.1.attn.heads"), ())
    _, counts = check(graph.plan(none).apply(model), images())
    assert counts["empty"] == 2
    program, _ = export_program(graph.plan(none).apply(model), images())
    assert "blocks.0.mlp.fc1.weight" not in program.state_dict


class Reads(nn.Module):
    """A layer and a norm, and something that reads them."""

    def __init__(self, read: Callable[[Reads, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.gamma = nn.Parameter(torch.rand(6) + 0.5)
        self.rows = nn.Parameter(torch.rand(4, 6))
        self.read = read
        randomised(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, x)


@pytest.mark.parametrize(
    "read",
    [
        lambda m, x: (y := m.layer(x)) * m.gamma + y,  # y itself is read, too
        lambda m, x: m.layer(x) * m.rows,  # not one factor a feature
        lambda m, x: m.layer(m.layer(x) * m.gamma),  # a weight that another layer shares
        lambda m, x: (y := m.norm(x)) + m.layer(y),  # a norm that the residual stream reads
        lambda m, x: m.layer(m.norm(x).transpose(0, 1).reshape(-1, 6).softmax(0)),
        lambda m, x: m.layer(x) * x.sum(-1, keepdim=True),  # no constant
        lambda m, x: m.layer(x.relu()[:, :1]) * m.rows,  # the product is larger
    ],
)
def test_what_cannot_be_folded_stays(read: Callable[[Reads, Tensor], Tensor]) -> None:
    _, counts = check(Reads(read), torch.randn(2, 4, 6))
    assert counts == {}


def test_factors_pass_through_moves_of_the_features() -> None:
    def read(m: Reads, x: Tensor) -> Tensor:
        halves = m.layer(x).reshape(-1, 4, 2, 3).permute(2, 0, 3, 1)
        first, second = halves[0] * 0.5, halves[1] / m.gamma[:3, None]
        return torch.cat([first + 1, second], 1).mean(-1)

    ops, counts = check(Reads(read), torch.randn(2, 4, 6))
    assert counts["factors"] == 3 and "aten.div.Tensor" not in ops


def test_a_model_without_folding_keeps_its_parameters() -> None:
    model = tiny()
    program, counts = export_program(model, images(), folded=False)
    assert counts == {} and program.state_dict.keys() == model.state_dict().keys()
