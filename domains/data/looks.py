"""Random looks of an image: other colours, contrasts and textures, what is drawn stays the same.

A model that has seen what a cut leaves in one look alone is kept for that look alone. Everything is
drawn from torch's global generator: under a seed, an image's look is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

Look = Callable[[Tensor], Tensor]
"""Pixels (3, height, width) in [0, 1] to others of this shape."""

Mix = Callable[[Tensor, Tensor], Tensor]
"""The same, with an image of another domain as the second argument."""


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))


def _stretched(pixels: Tensor) -> Tensor:
    """From 0 for the smallest to 1 for the largest value; something even is grey."""
    low, high = pixels.min(), pixels.max()
    return (pixels - low) / (high - low) if high > low else torch.full_like(pixels, 0.5)


def _grey(pixels: Tensor) -> Tensor:
    return F.rgb_to_grayscale(pixels, num_output_channels=3)


def _solarised(pixels: Tensor) -> Tensor:
    return F.solarize(pixels, _uniform(0.3, 0.9))


def _posterised(pixels: Tensor) -> Tensor:
    steps = 2 ** int(torch.randint(1, 4, ())) - 1
    return (pixels * steps).round() / steps


def _edges(pixels: Tensor) -> Tensor:
    """Sobel's gradient, dark on white or light on black."""
    kernel = pixels.new_tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    grey = functional.pad(_grey(pixels)[None, :1], (1, 1, 1, 1), mode="replicate")
    slopes = functional.conv2d(grey, torch.stack((kernel, kernel.T))[:, None])
    size = slopes.square().sum(1).sqrt()
    strength = (size / size.amax().clamp_min(1e-6)).expand_as(pixels)
    return 1 - strength if torch.rand(()) < 0.5 else strength


def _contrast(pixels: Tensor) -> Tensor:
    return F.adjust_contrast(pixels, _uniform(0.3, 3.0))


def _black_and_white(pixels: Tensor) -> Tensor:
    grey = _grey(pixels)
    low, high = grey.quantile(0.05), grey.quantile(0.95)
    return (grey > low + (high - low) * _uniform(0.3, 0.7)).to(pixels)


def _channels(pixels: Tensor) -> Tensor:
    return _stretched(torch.einsum("oi,ihw->ohw", torch.randn(3, 3), pixels))


def _blurred(pixels: Tensor) -> Tensor:
    sigma = _uniform(0.5, 2.0) * min(pixels.shape[-2:]) / 98
    return F.gaussian_blur(pixels, [2 * round(2 * sigma) + 1] * 2, [sigma] * 2)


_AUGMIX = v2.AugMix()
_JITTER = v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.8, hue=0.3)


def _augmix(pixels: Tensor) -> Tensor:
    return F.to_dtype(_AUGMIX(F.to_dtype(pixels, torch.uint8, scale=True)), scale=True)


def _jitter(pixels: Tensor) -> Tensor:
    mixed: Tensor = _JITTER(pixels)
    return mixed


def _textured(pixels: Tensor) -> Tensor:
    """A convolution drawn at random, mixed with the image."""
    size = (1, 3, 5, 7)[int(torch.randint(4, ()))]
    kernel = torch.randn(3, 3, size, size) / (3 * size * size) ** 0.5
    wide = functional.pad(pixels[None], (size // 2,) * 4, mode="replicate")
    drawn = _stretched(functional.conv2d(wide, kernel)[0])
    return drawn.lerp(pixels, _uniform(0.0, 1.0))


LOOKS: dict[str, Look] = {
    "plain": lambda pixels: pixels,
    "grey": _grey,
    "invert": lambda pixels: 1 - pixels,
    "solarise": _solarised,
    "posterise": _posterised,
    "edges": _edges,
    "contrast": _contrast,
    "threshold": _black_and_white,
    "channels": _channels,
    "blur": _blurred,
    "augmix": _augmix,
    "randconv": _textured,
    "jitter": _jitter,
}
"""Looks of an image by itself."""


def _mixed_amplitudes(pixels: Tensor, other: Tensor) -> Tensor:
    """Low frequencies with the amplitudes of another image in part; all phases stay."""
    mine, theirs = torch.fft.rfft2(pixels), torch.fft.rfft2(other)
    rows = torch.fft.fftfreq(pixels.shape[-2]).abs()[:, None]
    columns = torch.fft.rfftfreq(pixels.shape[-1])[None]
    low = (torch.maximum(rows, columns) <= _uniform(0.02, 0.25)).to(pixels)
    share = _uniform(0.0, 1.0) * low
    amplitude = mine.abs() * (1 - share) + theirs.abs() * share
    phase = torch.polar(amplitude, mine.angle())
    return torch.fft.irfft2(phase, s=pixels.shape[-2:]).clamp(0, 1)


def _mixed_statistics(pixels: Tensor, other: Tensor) -> Tensor:
    """Mean and spread of each channel, with those of another image in part."""
    share = _uniform(0.0, 1.0)
    (mine, spread), (theirs, wanted) = (
        (x.mean((1, 2), keepdim=True), x.std((1, 2), keepdim=True)) for x in (pixels, other)
    )
    even = (pixels - mine) / spread.clamp_min(1e-6)
    return (even * spread.lerp(wanted, share) + mine.lerp(theirs, share)).clamp(0, 1)


MIXES: dict[str, Mix] = {"amplitudes": _mixed_amplitudes, "statistics": _mixed_statistics}
"""Looks that are taken in part from an image of another domain."""


_CALM = ("grey", "invert", "edges", "posterise", "contrast", "threshold", "channels", "blur")

TO_TRAIN: dict[str, tuple[str, ...]] = {
    "none": (),
    "calm": ("plain", *_CALM),
    "all": (*LOOKS, *MIXES),
}
"""What a training draws from, all alike often: calm looks have no texture of their own."""

TO_CALIBRATE: tuple[str, ...] = TO_TRAIN["all"]
"""What a cut is fitted to: all alike often, so that no domain has a part in the choice."""


def in_random_look(
    pixels: Tensor, names: Sequence[str], other: Callable[[], Tensor] | None = None
) -> Tensor:
    """An image in one of several looks, drawn.

    Parameters
    ----------
    pixels : Tensor (3, height, width)
        In [0, 1]; stays as it is.
    names : sequence of str
        Of `LOOKS` and `MIXES`; one that is named twice is drawn twice as often.
    other : callable, optional
        Gives an image of the same shape from another domain; without, `MIXES` are not drawn.

    Returns
    -------
    Tensor (3, height, width)
        In [0, 1].

    References
    ----------
    Hendrycks et al., "AugMix", ICLR 2020. Xu et al., "Robust and Generalizable Visual
    Representation Learning via Random Convolutions", ICLR 2021. Xu et al., "A Fourier-based
    Framework for Domain Generalization", CVPR 2021 (amplitudes). Zhou et al., "Domain
    Generalization with MixStyle", ICLR 2021 (statistics, there of features).

    Examples
    --------
    >>> in_random_look(torch.rand(3, 8, 8), TO_TRAIN["all"]).shape
    torch.Size([3, 8, 8])
    """
    names = [name for name in names if other is not None or name in LOOKS]
    name = names[int(torch.randint(len(names), ()))]
    if name in LOOKS:
        return LOOKS[name](pixels)
    assert other is not None
    return MIXES[name](pixels, other())
