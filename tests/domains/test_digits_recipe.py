import pytest
import torch

from depgraph import DepgraphError
from domains import (
    DIGITS_MODELS,
    DIGITS_RECIPE,
    DIGITS_RECOVERY,
    digits_model,
)


@pytest.mark.parametrize("family", DIGITS_MODELS)
def test_the_models_take_small_images_and_have_ten_outputs(family):
    assert digits_model(family).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_weights_depend_on_the_seed_alone():
    first = digits_model("vit", seed=3).state_dict()
    torch.rand(1)
    again, other = (digits_model("vit", seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(DepgraphError, match=r"unknown digits model 'vitt'.*did you mean vit"):
        digits_model("vitt")


@pytest.mark.parametrize("recipe", [DIGITS_RECIPE, DIGITS_RECOVERY])
def test_the_digits_are_never_mirrored(recipe):
    assert recipe.hflip == 0


@pytest.mark.parametrize("family", DIGITS_MODELS)
def test_positions_are_as_loud_as_patches_and_matrices_keep_the_scale(family):
    model = digits_model(family)
    assert 0.2 < model.pos_embed.std().item() < 0.4
    signal = torch.randn(64, 128)
    widened = model.blocks[0].mlp.fc1(signal)
    assert 0.3 < (widened.std() / signal.std()).item() < 1.0  # timm's own: 0.2
