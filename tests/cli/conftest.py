from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from cli.main import program

TINY = [
    "vit_tiny_patch16_224",
    "--no-pretrained",
    "--img-size=32",
    "--model-arg=patch_size=8",
    "--model-arg=depth=2",
    "--model-arg=embed_dim=32",
    "--model-arg=num_heads=4",
]
"""MODEL and the options that make it small."""

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    """Run the program; standard output and standard error apart."""
    runner = CliRunner()

    def call(*args: object) -> Result:
        return runner.invoke(program, [str(arg) for arg in args])

    return call


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three domains, two classes, five images each."""
    rng = np.random.default_rng(0)
    for d, domain in enumerate(("clay", "ink", "wool")):
        for c, name in enumerate(("dot", "line")):
            folder = tmp_path / "data" / domain / name
            folder.mkdir(parents=True)
            for i in range(5):
                pixels = rng.integers(0, 60, (32, 32, 3)) + 60 * d
                pixels[8 : 16 + 8 * c, 12:20] = 255
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "data"
