"""The ways to cut and to train that `benchmarks.unseen` compares, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import click

from domains import RECIPES
from pruners import PRESETS
from pruners.choosing.choices import AUTO


@dataclass(frozen=True)
class Cut:
    """A metric, and the images that it and the least squares look at.

    `num_calibration` -1: each image of the sources once. `options` are further arguments of
    `pruners.prune`.
    """

    metric: str
    calibration: str
    num_calibration: int | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: {"kinds": AUTO})


def _preset(name: str) -> Cut:
    options = dict(PRESETS[name])
    return Cut(options.pop("metric"), "plain", -1, options)


PEER = "torch-pruning"
"""The cut that another library makes, by L2; no data has a part in it."""


CUTS = {
    "plain": Cut("obs", "plain"),
    "plain-all": Cut("obs", "plain", -1),
    "styles-256": Cut("obs", "styles", 256),
    "styles": Cut("obs", "styles"),
    "styles-4096": Cut("obs", "styles", 4096),
    "features": Cut("obs_features", "styles"),
    "styles-readers": Cut("obs", "styles", options={"kinds": AUTO, "compensate": "readers"}),
    "random": Cut("random", "styles"),
    **{name: _preset(name) for name in PRESETS},
}
"""By name: as they are, more images, more looks, both, the control, and the methods of others."""

_LOOKS = RECIPES["looks"].settings

TRAININGS = {
    "gentle": RECIPES["gentle"],
    "distill": RECIPES["distill"],
    "looks": RECIPES["looks"],
    "all-looks": replace(RECIPES["looks"], settings=replace(_LOOKS, looks="all")),
    "looks-1e-4": replace(RECIPES["looks"], settings=replace(_LOOKS, lr=1e-4)),
    "looks-2e-4": replace(RECIPES["looks"], settings=replace(_LOOKS, lr=2e-4)),
    "looks-alone": replace(RECIPES["looks"], distill=False),
    "no-looks": replace(RECIPES["looks"], settings=replace(_LOOKS, looks="none")),
    "no-tokens": replace(RECIPES["looks"], settings=replace(_LOOKS, feature_weight=0.0)),
    "mixed": replace(
        RECIPES["looks"],
        settings=replace(_LOOKS, looks="all", mixup=1.0, distill_weight=1.0),
    ),
    "no-labels": replace(RECIPES["looks"], settings=replace(_LOOKS, distill_weight=1.0)),
}
"""By name: the recipes, and the best one less each of its ingredients."""


START = "+start"
"""After the name of a training: the mean of the weights before and after it, as in WiSE-FT.

Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022.
"""


def known_ways(ctx: click.Context, param: click.Parameter, ways: tuple[str, ...]) -> Any:
    """Refuse a way that is none before any work."""
    for way in ways:
        cut, _, training = way.partition("/")
        trained = [*TRAININGS, *(name + START for name in TRAININGS if cut != PEER), ""]
        if cut not in (*CUTS, PEER) or training not in trained:
            raise click.BadParameter(
                f"'{way}' is not CUT or CUT/TRAINING, of {', '.join((*CUTS, PEER))} and "
                f"{', '.join(TRAININGS)}; {START} after it",
                ctx,
                param,
            )
    return ways
