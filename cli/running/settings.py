"""What one run does, as plain values: the only place that turns options into recipes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import domains
from cli.options.schedules import Schedule
from domains import FinetuneSettings
from domains.measuring import timing
from pruners.choosing.choices import check_choice

_FREE = ("device", "num_workers", "cache_mib")
"""What of a recipe may change on a resume: it does not decide the result."""

CONTROLS = {
    "dense": "nothing is cut; trained on by the recipe of the pruned models",
    "reinit": "a narrower model of the same cost: every group cut to the same share, its weights "
    "drawn anew, trained by the recipe of the dense model for as many epochs as the dense and the "
    "pruned model together",
}
"""What a sweep holds the metrics against, beside the metric `random`.

References
----------
Liu et al., "Rethinking the Value of Network Pruning", ICLR 2019 (training from scratch as control).
"""


@dataclass(frozen=True)
class RunSettings:
    """What one run does.

    Attributes
    ----------
    model : str
        How the dense model is called in the result.
    share : dict
        ``{"ratio": r}`` or ``{"target": {...}}``.
    pruning : dict
        Other arguments of `pruners.prune`; the metric by name.
    dense, recovery : FinetuneSettings
        Before and after pruning; None leaves the training out.
    lr_by_share : bool
        Divide the rate of `recovery` by the share of the MACs that is left.
    origin : dict
        What else decides the result: weights, arguments of the model, the split.
    control : str, optional
        One of `CONTROLS` in place of a cut by the metric, see `controlled`.
    recipe : str
        What `recovery` is called in the result, where it has a name.
    distill : bool
        Learn from the dense model's outputs after pruning.
    schedule : Schedule
        How the cut comes about, one-shot by default.
    timing : TimingSettings
    calibration : str
        Which images a cut is made with, see `cli.options.calibration`.
    across_domains : str or None
        How importance is combined over source domains; None: of all images together.
    device : str
    amp : bool
    seed : int
    latency : dict
        Arguments of `pruners.measured_latency`, for a target of latency.
    """

    model: str
    share: dict[str, Any]
    pruning: dict[str, Any]
    dense: FinetuneSettings | None
    recovery: FinetuneSettings | None
    origin: dict[str, Any] = field(default_factory=dict)
    control: str | None = None
    recipe: str | None = None
    distill: bool = False
    lr_by_share: bool = False
    schedule: Schedule = field(default_factory=Schedule)
    timing: timing.TimingSettings = field(default_factory=timing.TimingSettings)
    calibration: str = "plain"
    across_domains: str | None = None
    device: str = "cpu"
    amp: bool = False
    seed: int = 0
    latency: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """All of it as plain data."""
        file = self.latency.get("file")
        latency = {**self.latency, "file": None if file is None else str(file)}
        return {**asdict(self), "latency": latency}


def controlled(settings: RunSettings, control: str) -> RunSettings:
    """The settings of a run turned into those of one of `CONTROLS`."""
    check_choice("control", control, CONTROLS)
    if control == "dense":
        return replace(settings, control=control, share={"ratio": None}, schedule=Schedule())
    trained = settings.dense, settings.recovery
    epochs = sum(recipe.epochs for recipe in trained if recipe is not None)
    recipe = settings.dense or settings.recovery
    uniform = {"metric": "random", "scope": "uniform", "kinds": None, "compensate": False}
    return replace(
        settings,
        control=control,
        pruning={**settings.pruning, **uniform, "normalise": None, "per": None},
        across_domains=None,
        schedule=Schedule(),
        recovery=recipe and replace(recipe, epochs=epochs),
        distill=False,
        lr_by_share=False,
    )


def recovery_settings(recipe: str, share: float | None = None, **said: Any) -> FinetuneSettings:
    """A recipe after pruning, with what was said on the command line in its place.

    Parameters
    ----------
    recipe : str
        One of `domains.RECIPES`.
    share : float, optional
        Of the MACs that is left, where it is known.
    said : object
        None for what was not said.
    """
    chosen = domains.RECIPES[recipe]
    return adapted(chosen.settings if share is None else chosen.settings_for(share), **said)


def adapted(base: FinetuneSettings, **said: Any) -> FinetuneSettings:
    """A recipe with what was said (None: nothing) in its place."""
    given = {name: value for name, value in said.items() if value is not None}
    epochs = given.get("epochs", base.epochs)
    given.setdefault("warmup_epochs", min(base.warmup_epochs, epochs / 4))
    return replace(base, **given)


def deciding(recipe: FinetuneSettings | None) -> dict[str, Any] | None:
    """What of a recipe decides the result."""
    if recipe is None:
        return None
    return {name: value for name, value in asdict(recipe).items() if name not in _FREE}
