"""Decoding and timm's transforms: every image becomes 8-bit RGB, transparency laid over white."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.transforms import MaybeToTensor
from torch import Tensor, nn
from torchvision.transforms import Compose

from depgraph import DepgraphError
from domains.recipe import FinetuneSettings

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)  # formats that Pillow reads without further libraries

# Pillow raises these for broken files, by format: OSError (truncated, unknown), SyntaxError (bad
# PNG chunk), ValueError and the bomb error (absurd sizes), EOFError and IndexError (cut TIFF, GIF).
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    Image.DecompressionBombError,
)

Transform = Callable[[Image.Image], Tensor]


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except _BROKEN as error:
        if isinstance(error, DepgraphError):
            raise
        raise DepgraphError(f"image {path} is broken ({error}); replace or remove it") from error


def read_image(path: Path) -> Image.Image:
    """Decode one file to 8-bit RGB.

    Raises
    ------
    DepgraphError
        The file is gone, broken, or deeper than 8 bits (a cut to 8 bits would be silent).
    """
    with _opened(path) as image:
        if image.mode.startswith(("I", "F")):
            raise DepgraphError(f"image {path} has more than 8 bits a channel; convert it")
        if not image.has_transparency_data:
            return image.convert("RGB")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")


def verify_image(path: Path) -> None:
    """Raise DepgraphError unless the whole file decodes (headers alone hide cut-off files)."""
    read_image(path)


def read_all(paths: Sequence[Path], limit_mib: float) -> dict[Path, np.ndarray] | None:
    """Decode all images into memory, or return None when they need more than `limit_mib`.

    Returns
    -------
    dict of path to uint8 array (height, width, 3), or None
    """
    total = 0
    for path in paths:
        with _opened(path) as image:
            total += 3 * image.width * image.height
        if total > limit_mib * 2**20:
            return None
    with ThreadPoolExecutor(max_workers=4) as pool:
        arrays = pool.map(lambda path: np.asarray(read_image(path)), paths)
        return dict(zip(paths, arrays, strict=True))


def image_size(model: nn.Module, img_size: int | None = None) -> tuple[int, int]:
    """Return the (height, width) in pixels that `model` takes.

    `img_size` wins; then the size the model was built for (timm's `patch_embed.img_size`, a
    transformers `config.image_size`), which a timm `pretrained_cfg` does not know; then that.
    """
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    hugging_face = getattr(getattr(model, "config", None), "image_size", None)
    for size in (img_size, built, hugging_face):
        if isinstance(size, int):
            return size, size
        if isinstance(size, tuple | list) and len(size) == 2:
            return int(size[0]), int(size[1])
    height, width = resolve_data_config({}, model=model)["input_size"][-2:]
    return height, width


def _data_config(model: nn.Module, img_size: int | None) -> dict[str, Any]:
    size = (3, *image_size(model, img_size))
    return resolve_data_config({"input_size": size}, model=model)


def in_two(transform: Transform) -> tuple[Transform, Callable[[Tensor], Tensor]]:
    """A transform of timm's up to the pixels in [0, 1], and from there."""
    steps = transform.transforms  # type: ignore[attr-defined]  # torchvision's Compose
    at = next(i for i, step in enumerate(steps) if isinstance(step, MaybeToTensor)) + 1
    return Compose(steps[:at]), Compose(steps[at:])


def eval_transform(model: nn.Module, img_size: int | None = None) -> Transform:
    """Return timm's evaluation transform for this model: resize, centre crop, normalise."""
    return create_transform(**_data_config(model, img_size), is_training=False)


def train_transform(model: nn.Module, settings: FinetuneSettings) -> Transform:
    """Return timm's training transform for this model with the augmentation of `settings`."""
    config = _data_config(model, settings.img_size)
    return create_transform(
        **{key: config[key] for key in ("input_size", "interpolation", "mean", "std")},
        is_training=True,
        scale=settings.crop_scale,
        ratio=settings.crop_ratio,
        hflip=settings.hflip,
        color_jitter=settings.color_jitter,
        grayscale_prob=settings.grayscale,
        auto_augment=settings.auto_augment,
        re_prob=settings.random_erasing,
        re_mode="pixel",
    )
