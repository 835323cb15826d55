"""The judge itself: it must neither be too kind nor too strict."""

import pytest
import timm
import torch
from torch import nn

import depgraph
from tests.reference import (
    KeptNorm,
    masked,
    measured_macs,
    random_units,
    randomise,
    relative_difference,
    state,
)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=4
    )
    return randomise(model.eval()).double()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32).double()


@pytest.fixture(scope="module")
def graph(vit, images) -> depgraph.DependencyGraph:
    return depgraph.trace(vit, images)


@torch.no_grad()
def test_a_plan_that_keeps_all_masks_nothing(vit, graph, images):
    assert relative_difference(masked(vit, graph.plan({}))(images), vit(images)) < 1e-12


@torch.no_grad()
def test_masking_leaves_the_original_as_it_is(vit, graph):
    before = state(vit)
    masked(vit, graph.plan(random_units(graph, seed=0)))
    assert all(torch.equal(tensor, state(vit)[name]) for name, tensor in before.items())


@torch.no_grad()
def test_removed_heads_are_those_whose_output_never_reaches_the_projection(vit, graph, images):
    plan = graph.plan({"blocks.1.attn.heads": [0, 2]})

    def drop_heads(module, args):
        return (args[0].unflatten(-1, (4, 12)).index_fill(-2, torch.tensor([1, 3]), 0).flatten(-2),)

    with vit.blocks[1].attn.proj.register_forward_pre_hook(drop_heads):
        expected = vit(images)
    assert relative_difference(masked(vit, plan)(images), expected) < 1e-12


@torch.no_grad()
def test_removed_hidden_units_are_those_switched_off_behind_the_activation(vit, graph, images):
    plan = graph.plan({"blocks.0.mlp.hidden": range(0, 192, 2)})

    def drop_units(module, args):
        return (args[0].index_fill(-1, torch.arange(1, 192, 2), 0),)

    with vit.blocks[0].mlp.fc2.register_forward_pre_hook(drop_units):
        expected = vit(images)
    assert relative_difference(masked(vit, plan)(images), expected) < 1e-12


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_takes_its_statistics_over_the_kept_channels(kind):
    norm = randomise(kind(6))
    x, kept = torch.randn(3, 6), torch.tensor([0, 2, 5])
    small = kind(3)
    small.load_state_dict({name: tensor[kept] for name, tensor in norm.state_dict().items()})
    got = KeptNorm(norm, kept)(x)
    assert torch.allclose(got[:, kept], small(x[:, kept]))
    assert not got[:, [1, 3, 4]].any()


def test_random_units_differ_from_group_to_group_and_leave_one_at_least(graph):
    units = random_units(graph, seed=0, ratio=0.95)
    assert all(len(kept) >= 1 for kept in units.values())
    assert units["blocks.0.mlp.hidden"] != units["blocks.1.mlp.hidden"]
    assert len(units["blocks.0.mlp.hidden"]) != len(units["blocks.1.mlp.hidden"])


def test_counted_macs_of_a_vit_are_those_on_paper(vit, images):
    tokens, width = 17, 48
    block = tokens * width * (3 + 1 + 4 + 4) * width + 2 * tokens * tokens * width
    patches = 16 * width * 3 * 8 * 8
    assert measured_macs(vit, images) == patches + 2 * block + width * 1000
