import pytest
import timm
import torch
from PIL import Image
from torch import nn

from domains import FinetuneSettings, image_size
from domains.data.images import eval_transform, read_all, read_image, train_transform


def test_transparent_parts_are_laid_over_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert [read.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK"])
def test_every_usual_mode_is_read_as_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (3, 3)).save(path)
    assert read_image(path).mode == "RGB"


def test_the_size_is_that_the_model_was_built_for_not_that_of_its_pretraining():
    model = timm.create_model("vit_tiny_patch16_224", img_size=(64, 96), num_classes=3, depth=1)
    assert image_size(model) == (64, 96)
    assert image_size(model, 80) == (80, 80)


def test_a_transformers_config_says_the_size():
    model = nn.Linear(1, 1)
    model.config = type("Config", (), {"image_size": 48})()  # type: ignore[assignment]
    assert image_size(model) == (48, 48)


def test_without_any_word_of_it_the_size_is_224():
    assert image_size(nn.Linear(1, 1)) == (224, 224)


def test_transforms_use_the_models_size_and_normalisation():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=1)
    image = Image.new("RGB", (50, 40), "white")
    plain = eval_transform(model)(image)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(plain, ((1 - mean) / std).expand(3, 32, 32))
    assert train_transform(model, FinetuneSettings())(image).shape == (3, 32, 32)


def test_the_cache_holds_all_images_or_none(split):
    paths = [sample.path for sample in split.test]
    needed_mib = len(paths) * 16 * 16 * 3 / 2**20
    assert read_all(paths, 0.9 * needed_mib) is None
    pixels = read_all(paths, 1.1 * needed_mib)
    assert pixels is not None
    assert pixels[paths[3]].tobytes() == read_image(paths[3]).tobytes()
