from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import depgraph
from pruners.refitting.basis import align_head_dims
from pruners.refitting.compensation import compensate
from pruners.statistics.attention import find_attentions
from tests.depgraph.models import images, tiny
from tests.reference import randomise, relative_difference

FAMILIES = [
    "vit_base_patch16_224",
    "deit_base_distilled_patch16_224",
    "beit_base_patch16_224",
]


def batches(samples: int = 16) -> list[tuple[Tensor, Tensor]]:
    return [(images(samples), torch.zeros(samples, dtype=torch.long))]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turned_model_computes_the_same(name: str) -> None:
    model = randomise(tiny(name))
    for key, buffer in model.named_buffers():
        if key.endswith("k_bias"):
            buffer.zero_()
    turned = copy.deepcopy(model)
    graph = depgraph.trace(model, images())
    found = align_head_dims(turned, graph, batches())
    assert len(found) == len(model.blocks)
    assert relative_difference(turned(images()), model(images())) < 1e-4
    assert not torch.allclose(turned.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
def test_a_turned_model_keeps_its_precision(dtype: torch.dtype, tolerance: float) -> None:
    model, x = tiny(FAMILIES[0]).to(dtype), images().to(dtype)
    turned = copy.deepcopy(model)
    data = [(x, labels) for _, labels in batches(len(x))]
    assert len(align_head_dims(turned, depgraph.trace(model, x), data)) == len(model.blocks)
    assert {parameter.dtype for parameter in turned.parameters()} == {dtype}
    assert relative_difference(turned(x), model(x)) < tolerance


def test_layers_that_run_within_one_function_are_left_as_they_are() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3)).eval()
    x = torch.randn(4, 5, 8)
    graph = depgraph.trace(model, x)
    assert len(find_attentions(graph)) == 1
    turned = copy.deepcopy(model)
    assert align_head_dims(turned, graph, [(x, torch.zeros(4, dtype=torch.long))]) == []
    assert torch.equal(turned(x), model(x))


def test_turned_weights_keep_their_scale() -> None:
    model = tiny(FAMILIES[0])
    turned = copy.deepcopy(model)
    align_head_dims(turned, depgraph.trace(model, images()), batches(64))
    for before, after in zip(model.blocks, turned.blocks, strict=True):
        pairs = zip(before.attn.qkv.weight.chunk(3), after.attn.qkv.weight.chunk(3), strict=True)
        assert all(0.5 < (new.norm() / old.norm()).item() < 2 for old, new in pairs)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_dims_of_each_head_carry_most_of_it(name: str) -> None:
    model = randomise(tiny(name))
    graph = depgraph.trace(model, images())
    turned = copy.deepcopy(model)
    align_head_dims(turned, graph, batches(64))
    head_dims = [group for group in graph.prunable if group.kind == "head_dim"]
    half = graph.plan({group.name: range(group.size // 2) for group in head_dims})
    wanted = model(images(64))
    errors = []
    for dense in (model, turned):
        small = half.apply(dense)
        compensate(dense, small, half, batches(64))
        errors.append((small(images(64)) - wanted).norm().item())
    assert errors[1] < 0.8 * errors[0]


def test_norms_of_queries_and_keys_forbid_a_turn() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, qk_norm=True, num_classes=3
    ).eval()
    graph = depgraph.trace(model, torch.zeros(1, 3, 32, 32))
    assert find_attentions(graph) == []


def test_values_that_are_read_twice_forbid_a_turn() -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            y = nn.functional.scaled_dot_product_attention(q, k, v) + v.relu()
            return self.proj(y.transpose(1, 2).reshape(x.shape)) + x

    graph = depgraph.trace(Local(), torch.zeros(2, 5, 8))
    assert find_attentions(graph) == []


def test_a_shared_cut_of_heads_that_use_other_dims_loses_nothing_once_turned() -> None:
    """Head 0 uses the first half of its dims, head 1 the second: no shared cut fits both as is."""
    model = tiny()
    with torch.no_grad():
        for block in model.blocks:
            weight = block.attn.qkv.weight.view(3, 4, 12, -1)
            bias = block.attn.qkv.bias.view(3, 4, 12)
            for head in range(4):
                unused = slice(6, 12) if head % 2 == 0 else slice(0, 6)
                weight[:, head, unused] = 0
                bias[:, head, unused] = 0
    graph = depgraph.trace(model, images())
    turned = copy.deepcopy(model)
    align_head_dims(turned, graph, batches(32))
    groups = [group.name for group in graph.prunable if group.kind == "head_dim"]
    plan = graph.plan(dict.fromkeys(groups, range(6)))
    small = plan.apply(turned)
    compensate(turned, small, plan, batches(64), damping=1e-9)
    assert relative_difference(small(images()), model(images())) < 0.01
