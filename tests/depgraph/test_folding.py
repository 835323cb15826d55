from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import depgraph
from depgraph.rewriting.constants import _KEPT
from tests.depgraph.models import images, tiny


def pruned_beit() -> nn.Module:
    model = tiny("beit_base_patch16_224")
    graph = depgraph.trace(model, images())
    return graph.plan({"blocks.0.attn.head_dim": [0, 1, 2, 5], "blocks.0.attn.heads": [1]}).apply(
        model
    )


def test_a_bias_that_parameters_alone_decide_is_computed_once() -> None:
    small = pruned_beit()
    attention = small.blocks[0].attn
    with torch.no_grad():
        small(images())
        first = attention.depgraph_constants_0
        small(images())
        assert all(a is b for a, b in zip(first, attention.depgraph_constants_0, strict=True))
    assert attention in _KEPT


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.copy_(torch.ones_like(x)),
        lambda x: x.detach().add_(1),
    ],
)
def test_a_changed_parameter_is_seen(change) -> None:  # type: ignore[no-untyped-def]
    small = pruned_beit()
    table = small.blocks[0].attn.relative_position_bias_table
    with torch.no_grad():
        small(images())
        change(table)
        again = small(images())
    torch.testing.assert_close(again, small(images()))  # with gradients nothing is kept


def test_a_loaded_state_and_a_copy_have_their_own() -> None:
    small = pruned_beit()
    with torch.inference_mode():
        small(images())
    other = copy.deepcopy(small)
    state = {
        name: value + 0.1 for name, value in small.state_dict().items() if value.is_floating_point()
    }
    other.load_state_dict(state, strict=False)
    with torch.inference_mode():
        made = other(images())
    torch.testing.assert_close(made, other(images()))
    small.load_state_dict(state, strict=False, assign=True)
    with torch.inference_mode():
        torch.testing.assert_close(small(images()), made)


def test_gradients_reach_the_parameters_of_a_kept_bias() -> None:
    small = pruned_beit()
    with torch.no_grad():
        small(images())
    small(images()).sum().backward()
    assert small.blocks[0].attn.relative_position_bias_table.grad.abs().sum() > 0
