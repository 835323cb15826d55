"""Four ways to draw a digit; each takes its ink at twice the size, and gives 32 x 32 RGB."""

import colorsys
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageFilter

SIZE = 32  # pixels a side
_LARGE = 2 * SIZE  # where shapes are made, so that their edges come out smooth
_MARGIN = 6  # of _LARGE, kept free on each side

Style = Callable[[Image.Image, np.random.Generator], Image.Image]


def enlarge(digit: np.ndarray) -> Image.Image:
    """Return the ink of an 8 x 8 scan with values 0 to 16: 64 x 64, 0 paper, 255 ink."""
    small = Image.fromarray((digit * (255 / 16)).astype(np.uint8))
    side = _LARGE - 2 * _MARGIN
    smooth = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    crisp = 255 / (1 + np.exp((110 - smooth) / 16))
    ink = Image.new("L", (_LARGE, _LARGE))
    ink.paste(Image.fromarray(crisp.astype(np.uint8)), (_MARGIN, _MARGIN))
    return ink


def _scan(ink: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Dark grey ink on light grey paper with the grain of a scanner."""
    share = _share(ink)
    paper, pen = rng.uniform(215, 250), rng.uniform(10, 70)
    grain = rng.normal(0, 5, (SIZE, SIZE))
    grey = paper + (pen - paper) * share + grain
    return _to_image(np.repeat(grey[:, :, None], 3, axis=2))


def _photo(ink: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The digit inverts a piece of a photograph, as in MNIST-M, and is lifted to be readable."""
    photos = _photographs()
    photo = photos[rng.integers(len(photos))]
    top = rng.integers(photo.shape[0] - SIZE + 1)
    left = rng.integers(photo.shape[1] - SIZE + 1)
    piece = photo[top : top + SIZE, left : left + SIZE].astype(np.float32)
    # A grey piece is its own inverse: push what is written away from the mean of the piece.
    dark = piece.mean() < 128
    inverse = 255 - piece
    written = 0.5 * inverse + 0.5 * (255 if dark else 0)
    return _to_image(_mix(piece, written, _share(ink)))


def _outline(ink: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The contour alone, a thin line in black on white."""
    width = int(rng.choice([3, 5]))
    shape = ink.point(lambda value: 255 * (value > 127))
    line = ImageChops.subtract(
        shape.filter(ImageFilter.MaxFilter(width)), shape.filter(ImageFilter.MinFilter(3))
    )
    share = _share(line)
    return _to_image(np.repeat(255 - 245 * share[:, :, None], 3, axis=2))


def _poster(ink: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turned by up to 35 degrees, slanted, in a bright colour on a two-coloured ground."""
    angle, slant = np.deg2rad(rng.uniform(-35, 35)), rng.uniform(-0.25, 0.25)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1, slant], [0, 1]])
    centre = np.full(2, _LARGE / 2)
    affine = np.column_stack([matrix, centre - matrix @ centre]).flatten().tolist()
    turned = ink.transform(ink.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    hue = rng.uniform()
    ground = _hsv(hue, 0.75, 0.55), _hsv(hue + rng.uniform(0.08, 0.2), 0.85, 0.45)
    pen = _hsv(hue + rng.uniform(0.4, 0.6), rng.uniform(0.3, 0.6), 1.0)
    ramp = np.linspace(0, 1, SIZE)[:, None, None]
    paper = ground[0] + (ground[1] - ground[0]) * np.broadcast_to(ramp, (SIZE, SIZE, 1))
    return _to_image(_mix(paper, pen, _share(turned)))


STYLES: dict[str, Style] = {
    "outline": _outline,
    "photo": _photo,
    "poster": _poster,
    "scan": _scan,
}


def _share(ink: Image.Image) -> np.ndarray:
    """Return (SIZE, SIZE) floats in [0, 1]: how much of the pixel is written on."""
    return np.asarray(ink.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32) / 255


def _mix(paper: np.ndarray, pen: np.ndarray, share: np.ndarray) -> np.ndarray:
    return paper + (pen - paper) * share[:, :, None]


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32) * 255


@cache
def _photographs() -> list[np.ndarray]:
    """Return scikit-learn's two photographs, half the size so that a piece has structure."""
    from sklearn.datasets import load_sample_images

    return [np.asarray(Image.fromarray(image).reduce(2)) for image in load_sample_images().images]
