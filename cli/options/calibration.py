"""From ``--calibration`` to the images that a cut is made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from torch import nn

import domains
import pruners
from domains import DomainData, Split

CALIBRATION = "styles"
"""What `run` and `prune` take when nothing is said."""

BATCH = 16
"""Images at once."""


def known_calibration(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The word or the folder, refused before any work where it is neither."""
    if value is None or not is_folder(value) or Path(value).is_dir():
        return value
    raise click.BadParameter(f"'{value}' is not styles, plain or a folder of images", ctx, param)


def is_folder(how: str | None) -> bool:
    """Whether what ``--calibration`` says is a folder."""
    return how not in (None, "styles", "plain")


def reads_labels(metric: str) -> bool:
    """Whether a metric looks at the labels of images."""
    return hasattr(pruners.make_metric(metric), "loss")


def calibrated_with(
    how: str | None,
    metric: str,
    model: nn.Module,
    samples: Split | DomainData | None,
    *,
    num_samples: int | None,
    num_calibration: int | None,
    seed: int,
) -> dict[str, Any]:
    """Arguments of `pruners.prune` that say which images are looked at.

    Parameters
    ----------
    how : str, optional
        ``"styles"``: each image in a random look; ``"plain"``: as they are; else a folder
        of images without labels, with which metrics that read labels are not scored.
    metric : str
    model : nn.Module
        Decides size and normalisation of the images, and the device.
    samples : Split or DomainData, optional
    num_samples, num_calibration : int, optional
        Images to score and to compensate with, where they were said.
    seed : int

    Returns
    -------
    dict
        ``batches``, ``calibration``, ``num_samples`` and ``num_calibration``.
    """
    how = CALIBRATION if how is None else how
    said: dict[str, Any] = {"batch_size": BATCH, "seed": seed}
    numbers = {"num_samples": num_samples, "num_calibration": num_calibration}
    plain = None if samples is None else domains.batches(model, samples, **said)
    if is_folder(how):
        unlabelled = domains.folder_batches(model, how, **said)
        scored = plain if reads_labels(metric) else unlabelled
        return {**numbers, "batches": scored, "calibration": unlabelled}
    if samples is None or how == "plain":
        return {**numbers, "batches": plain, "calibration": None}
    count = domains.batches(model, samples, looks=True, **said).num_samples
    numbers["num_calibration"] = num_calibration or count
    if num_samples is None:  # more looks than plain images, so twice as many
        wanted = pruners.samples_wanted(pruners.make_metric(metric))
        numbers["num_samples"] = min(2 * wanted, count)
    most = max(number for number in numbers.values() if number is not None)
    looks = domains.batches(model, samples, looks=True, num_samples=most, **said)
    return {**numbers, "batches": looks, "calibration": None}
