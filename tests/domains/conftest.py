"""Tiny folders of images and a tiny model, so that a training takes a tenth of a second."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from domains import DomainData, FinetuneSettings, Split, leave_one_out, load_domains, write_digits

MakeTree = Callable[..., Path]

# What class it is shows in the hue; each domain adds its own noise.
COLOURS = {"blue": (30, 30, 220), "green": (30, 200, 30), "red": (220, 30, 30)}


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """Return make(domains, per_class): writes 16 px images, and gives the root."""

    def make(domains: tuple[str, ...] = ("art", "cartoon", "photo"), per_class: int = 10) -> Path:
        root = tmp_path / "data"
        for d, domain in enumerate(domains):
            rng = np.random.default_rng(d)
            for name, colour in COLOURS.items():
                folder = root / domain / name
                folder.mkdir(parents=True)
                for i in range(per_class):
                    noise = rng.normal(0, 20 + 10 * d, (16, 16, 3))
                    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        return root

    return make


@pytest.fixture
def data(make_tree: MakeTree) -> DomainData:
    """Three domains, three classes, ten images each."""
    return load_domains(make_tree())


@pytest.fixture
def split(data: DomainData) -> Split:
    """Target: photo."""
    return leave_one_out(data, "photo", seed=1)


class TinyNet(nn.Module):
    """A small convolution net with drop-out and batch norm, for images of any size."""

    def __init__(self, classes: int = 3, heads: int = 1, seed: int = 0, width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, width, 3, stride=2)
            self.norm = nn.BatchNorm2d(width)
            self.drop = nn.Dropout(0.2)
            self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(heads))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        features = self.drop(self.norm(self.conv(images)).relu().mean((2, 3)))
        outputs = tuple(head(features) for head in self.heads)
        if len(outputs) == 1:
            return outputs[0]
        return outputs if self.training else torch.stack(outputs).mean(0)


@pytest.fixture
def tiny_net() -> Callable[..., TinyNet]:
    """Return the class, for tests that need several."""
    return TinyNet


@pytest.fixture
def quick() -> FinetuneSettings:
    """Three epochs on 16 px images, on the CPU."""
    return FinetuneSettings(
        epochs=3,
        batch_size=16,
        lr=1e-2,
        warmup_epochs=0.5,
        img_size=16,
        device="cpu",
        num_workers=0,
    )


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty digits of each class in four domains."""
    return write_digits(tmp_path_factory.mktemp("digits") / "data", per_class=20)
