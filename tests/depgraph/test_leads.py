from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import depgraph
from tests.depgraph.models import WrittenOut, images, tiny
from tests.reference import masked, random_units, randomise, relative_difference


def own_dims(graph: depgraph.DependencyGraph, seed: int = 0) -> dict[str, Tensor]:
    """Half of the head dims of every head, drawn for each head by itself."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in graph.prunable:
        lead = graph.lead(group.name)
        if group.kind == "head_dim" and lead is not None:
            order = torch.rand(lead.size, group.size, generator=generator).argsort(dim=1)
            kept[group.name] = order[:, : group.size // 2].sort(dim=1).values
    return kept


def torch_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48
    ).eval()


def tokens() -> Tensor:
    return torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))


TIMM = ["vit_base_patch16_224", "deit_base_distilled_patch16_224", "beit_base_patch16_224"]
MODELS = {
    **{name: (lambda name=name: tiny(name), images) for name in TIMM},
    "torchvision": (torch_vit, images),
    "written out": (lambda: WrittenOut().eval(), tokens),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_heads_with_dims_of_their_own_compute_the_masked_original(name) -> None:
    make, inputs = MODELS[name]
    model, example = randomise(make()).double(), inputs().double()
    graph = depgraph.trace(model, example)
    kept = own_dims(graph)
    assert kept
    plan = graph.plan({**random_units(graph, seed=2), **kept})
    small = plan.apply(model)
    assert plan.choices.keys() == kept.keys()
    assert relative_difference(small(example), masked(model, plan)(example)) < 1e-9
    again = depgraph.Plan.from_json(plan.to_json())
    assert again == plan
    assert torch.equal(again.apply(model)(example), small(example))


def test_head_dims_are_led_by_heads_and_nothing_else_is_led() -> None:
    graph = depgraph.trace(tiny(), images())
    leads = {group.kind: graph.lead(group.name) for group in graph.prunable}
    assert leads["head_dim"].kind == "heads"
    assert {kind for kind, lead in leads.items() if lead is not None} == {"head_dim"}


def test_a_norm_of_the_head_dims_makes_all_heads_keep_the_same() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, qk_norm=True, num_classes=3
    )
    graph = depgraph.trace(model.eval(), images())
    assert all(graph.lead(group.name) is None for group in graph.prunable)


def test_heads_that_are_added_up_make_all_heads_keep_the_same() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(6, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 6).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return x + self.proj(y.mean(1))

    graph = depgraph.trace(Summed(), torch.randn(2, 5, 24))
    assert all(graph.lead(group.name) is None for group in graph.prunable)


def test_the_same_row_for_all_heads_is_an_ordinary_plan() -> None:
    graph = depgraph.trace(WrittenOut().eval(), torch.randn(2, 5, 24))
    plan = graph.plan({"head_dim": [[0, 2]] * 4})
    assert plan == graph.plan({"head_dim": [0, 2]})
    assert plan.choices == {}


@pytest.mark.parametrize(
    ("units", "says"),
    [
        ([[0, 1]] * 3, "4 rows"),
        ([[0, 1]] * 3 + [[0]], "equally many"),
        ([[0, 1]] * 3 + [[0, 6]], "unit 6"),
    ],
)
def test_rows_that_do_not_fit_are_refused(units: list[list[int]], says: str) -> None:
    graph = depgraph.trace(WrittenOut().eval(), torch.randn(2, 5, 24))
    with pytest.raises(depgraph.DepgraphError, match=says):
        graph.plan({"head_dim": units})


def test_rows_for_a_group_that_nothing_leads_are_refused() -> None:
    graph = depgraph.trace(tiny(), images())
    with pytest.raises(depgraph.DepgraphError, match="one row"):
        graph.plan({"blocks.0.mlp.hidden": [[0, 1], [2, 3]]})
