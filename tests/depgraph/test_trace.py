from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import depgraph
from depgraph.tracing.trace import shape, trace_forward
from tests.depgraph.models import Tied, images, tiny


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = tiny().train()
    model.blocks[0].eval()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()}
    attributes = {name: repr(vars(module)) for name, module in model.named_modules()}
    depgraph.trace(model, images())
    assert all(torch.equal(model.state_dict()[name], was) for name, (_, was) in before.items())
    assert {name: repr(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.training and not model.blocks[0].training


def test_a_model_on_the_meta_device_has_the_groups_of_the_real_one() -> None:
    with torch.device("meta"):
        meta = timm.create_model("deit_tiny_patch16_224", depth=2)
    real = timm.create_model("deit_tiny_patch16_224", depth=2)
    example = torch.randn(1, 3, 224, 224)
    assert depgraph.trace(meta, example).groups == depgraph.trace(real, example).groups


def test_train_and_eval_mode_give_the_same_groups() -> None:
    model = tiny(drop_path_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1)
    in_eval = depgraph.trace(model, images()).groups
    assert depgraph.trace(model.train(), images()).groups == in_eval


def test_each_op_knows_the_innermost_module_that_ran_it() -> None:
    traced = trace_forward(tiny(), (images(),), {})
    owners = {str(node.target): traced.owner[node] for node in traced.nodes if node in traced.owner}
    assert owners["aten.scaled_dot_product_attention.default"] == "blocks.1.attn"
    assert owners["aten.conv2d.default"] == "patch_embed.proj"


def test_tied_parameters_are_one_value() -> None:
    traced = trace_forward(Tied(), (torch.zeros(2, 3, dtype=torch.long),), {})
    assert "embed.weight" in traced.tensors and "head.weight" not in traced.tensors


def test_a_batch_of_one_is_told_from_other_dimensions() -> None:
    graph = depgraph.trace(tiny(), images(1))
    assert graph.traced.batch == 2
    assert graph.macs == depgraph.trace(tiny(), images(3)).macs


def test_a_model_for_batch_one_only_is_traced_at_batch_one() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.reshape(1, 4))

    assert depgraph.trace(Single(), torch.randn(1, 4)).traced.batch == 1


def test_wrong_inputs_are_refused_with_the_module_that_failed() -> None:
    with pytest.raises(depgraph.DepgraphError, match=r"'patch_embed'"):
        depgraph.trace(tiny(), torch.randn(1, 3, 40, 40))


def test_a_branch_on_data_is_refused() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    said = r"is_nonzero \(test_trace.py, line \d+\) reads the value of a tensor"
    with pytest.raises(depgraph.DepgraphError, match=said):
        depgraph.trace(Branch(), torch.randn(2, 3))


def test_a_tensor_that_is_moved_to_the_inputs_device_stays_a_constant() -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place = torch.randn(3)  # no buffer

        def forward(self, x: Tensor) -> Tensor:
            return x + self.place.to(x.device, dtype=torch.float64)

    model, x = Placed(), torch.randn(2, 3, dtype=torch.float64)
    traced = depgraph.trace(model, x).traced
    assert torch.equal(traced.graph_module(x)[0], model(x))


def test_the_traced_graph_runs_by_itself_whatever_the_modules_are_called() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)
    traced = depgraph.trace(model, x).traced
    assert torch.equal(traced.graph_module(*model.parameters(), x)[0], model(x))


def test_inputs_without_a_tensor_are_refused() -> None:
    with pytest.raises(depgraph.DepgraphError, match="no Tensor"):
        depgraph.trace(tiny(), (3,))


def test_dead_code_does_not_shift_the_ranges_of_calls() -> None:
    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x.exp()
            hidden = self.first(x)
            hidden.exp()
            return self.second(hidden)

    traced = trace_forward(Wasteful(), (torch.randn(3, 4),), {})
    call = next(call for call in traced.calls if call.name == "second")
    assert [shape(node) for node in traced.nodes[call.start : call.end]] == [(3, 2)]


def test_a_forward_that_divides_by_zero_is_an_error_of_the_model() -> None:
    class ByZero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (x.shape[1] - 4) ** -0.5

    with pytest.raises(depgraph.DepgraphError, match="ByZero"):
        depgraph.trace(ByZero(), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("wrapped", "text"),
    [
        (lambda model: nn.DataParallel(model), "spreads batches"),
        (lambda model: torch.compile(model, backend="eager"), "is compiled"),
        (lambda model: nn.Sequential(nn.LazyLinear(3), model), "has no shapes yet"),
    ],
)
def test_what_is_no_plain_module_is_refused_with_what_to_pass(wrapped: Any, text: str) -> None:
    with pytest.raises(depgraph.DepgraphError, match=text):
        depgraph.trace(wrapped(tiny()), images())


def test_a_batch_of_no_samples_is_refused() -> None:
    with pytest.raises(depgraph.DepgraphError, match="at least one"):
        depgraph.trace(tiny(), images()[:0])
