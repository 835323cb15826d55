"""What runs start from: timm's models and the project's recipes, or the digits' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

import domains
from cli.options.calibration import CALIBRATION
from cli.running.models import check_name, load_model
from depgraph import DepgraphError
from domains import FinetuneSettings
from pruners.choosing.choices import check_choice


@dataclass(frozen=True)
class Start:
    """How models are made, and how they are trained where nothing else is said.

    Attributes
    ----------
    load : callable
        Arguments as of `cli.running.models.load_model`; gives the model.
    check : callable
        The same arguments; refuses, fast, what `load` would.
    dense : FinetuneSettings
        Training before pruning.
    recovery : FinetuneSettings, optional
        Training after it; None: by ``--recipe``, or as suits the cut.
    alike : tuple of str
        Settings of `dense` that every recipe after pruning takes over.
    calibration : str
        Images that a cut is made with, see `cli.options.calibration`.
    """

    load: Callable[..., nn.Module]
    check: Callable[..., None]
    dense: FinetuneSettings = FinetuneSettings()  # noqa: RUF009  # frozen
    recovery: FinetuneSettings | None = None
    alike: tuple[str, ...] = ()
    calibration: str = CALIBRATION

    def recovery_for(self, recipe: str) -> FinetuneSettings:
        """The settings of one of `domains.RECIPES`, as they suit this data."""
        own = {name: value for name, value in asdict(self.dense).items() if name in self.alike}
        return replace(domains.RECIPES[recipe].settings, **own)


def _check_timm(name: str, *, pretrained: bool, weights: Path | None, **_: Any) -> None:
    if not Path(name).is_dir():
        check_name(name, pretrained and weights is None)
    if weights is not None and not weights.is_file():
        raise DepgraphError(f"there is no file '{weights}'")


def _check_digits(name: str, **said: Any) -> None:
    check_choice("digits model", name, domains.DIGITS_MODELS)
    for option in ("weights", "img_size", "model_args"):
        if said.get(option):
            raise DepgraphError(f"the digits' models are fixed; leave {option} of '{name}' out")


def _load_digits(name: str, *, seed: int = 0, **said: Any) -> nn.Module:
    _check_digits(name, **said)
    return domains.digits_model(name, seed=seed)


TIMM = Start(load_model, _check_timm, FinetuneSettings(looks="all"))

DIGITS = Start(
    _load_digits,
    _check_digits,
    domains.DIGITS_RECIPE,
    domains.DIGITS_RECOVERY,
    ("batch_size", "smoothing", "hflip", "crop_scale", "crop_ratio", "color_jitter", "grayscale"),
    "plain",
)
"""Models from nothing, by the names of `domains.DIGITS_MODELS`; nothing of them is in looks."""
