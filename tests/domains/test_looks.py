from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from domains import FinetuneSettings
from domains.data.images import eval_transform, train_transform
from domains.data.loading import ImageDataset, domain_numbers
from domains.data.looks import LOOKS, MIXES, TO_TRAIN, in_random_look
from domains.running.random import seeded
from domains.training.features import Features


def pixels() -> Tensor:
    with seeded(0):
        return torch.rand(3, 20, 17)


@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize("image", [pixels(), torch.ones(3, 5, 5), torch.zeros(3, 8, 1)])
def test_a_look_is_an_image_of_the_same_size(name: str, image: Tensor) -> None:
    before = image.clone()
    for seed in range(5):
        with seeded(seed):
            seen = LOOKS[name](image)
        assert seen.shape == image.shape
        assert seen.min() >= 0 and seen.max() <= 1
    assert torch.equal(image, before)


@pytest.mark.parametrize("name", MIXES)
def test_a_mix_with_itself_changes_nothing_and_with_another_image_something(name: str) -> None:
    one, other = pixels(), pixels().flip(0) ** 3
    with seeded(1):
        torch.testing.assert_close(MIXES[name](one, one), one, rtol=1e-3, atol=1e-4)
        mixed = MIXES[name](one, other)
    assert mixed.min() >= 0 and mixed.max() <= 1
    assert not torch.allclose(mixed, one, atol=0.01)


def test_mixed_amplitudes_keep_the_detail() -> None:
    """High frequencies are those of the image itself."""
    with seeded(3):
        one, other = torch.rand(3, 32, 32) * 0.2 + 0.4, torch.rand(3, 32, 32) * 0.2 + 0.4
        mixed = MIXES["amplitudes"](one, other)
    now, was = torch.fft.rfft2(mixed), torch.fft.rfft2(one)
    torch.testing.assert_close(now[:, 9:24, 9:], was[:, 9:24, 9:], rtol=1e-3, atol=1e-3)


def test_a_look_is_a_function_of_the_seed() -> None:
    def seen(seed: int) -> Tensor:
        with seeded(seed):
            return in_random_look(pixels(), TO_TRAIN["all"])

    assert torch.equal(seen(4), seen(4))
    assert len({float(seen(seed).sum()) for seed in range(20)}) > 8


def test_only_images_of_other_domains_are_mixed_in(split, tiny_net) -> None:
    samples = [sample for part in split.train.values() for sample in part]
    transform = eval_transform(tiny_net(), 16)
    data = ImageDataset(
        samples, transform, domains=domain_numbers(split.train), looks=TO_TRAIN["all"]
    )
    drawn = {data._elsewhere(0) for _ in range(100)}
    assert data.domains is not None
    assert drawn and {data.domains[index] for index in drawn} == {1}


def test_a_draw_is_in_a_look_of_its_own(split, tiny_net) -> None:
    samples = [sample for part in split.train.values() for sample in part]
    settings = FinetuneSettings(crop_scale=(1, 1), crop_ratio=(1, 1), hflip=0, color_jitter=0)
    transform = train_transform(tiny_net(), replace(settings, grayscale=0, img_size=16))
    seen: dict[tuple[str, ...], int] = {}
    for looks in TO_TRAIN.values():
        data = ImageDataset(samples, transform, domains=domain_numbers(split.train), looks=looks)
        draws = [data[0, seed][0] for seed in range(30)]
        seen[looks] = len({tuple(draw.flatten().tolist()) for draw in draws})
        assert torch.equal(data[0, 7][0], draws[7])
    assert seen[()] == 1
    assert seen[TO_TRAIN["calm"]] > 8 and seen[TO_TRAIN["all"]] > 10


def test_the_tokens_are_what_the_last_places_give(tiny_net) -> None:
    model, images = tiny_net().eval(), torch.rand(4, 3, 16, 16)
    with torch.no_grad(), Features(model, with_tokens=True) as features:
        model(images)
        torch.testing.assert_close(features.tokens, model.norm(model.conv(images)))
