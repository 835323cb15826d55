"""What one run does, as plain values: the only place that turns options into recipes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import domains
from domains import FinetuneSettings, timing

_FREE = ("device", "num_workers", "cache_mib")
"""What of a recipe may change on a resume: it does not decide the result."""


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
    distill : bool
        Learn from the dense model's outputs after pruning.
    timing : TimingSettings
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
    distill: bool = False
    lr_by_share: bool = False
    timing: timing.TimingSettings = field(default_factory=timing.TimingSettings)
    device: str = "cpu"
    amp: bool = False
    seed: int = 0
    latency: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """All of it as plain data."""
        file = self.latency.get("file")
        latency = {**self.latency, "file": None if file is None else str(file)}
        return {**asdict(self), "latency": latency}


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
    return _settings(chosen.settings if share is None else chosen.settings_for(share), said)


def dense_settings(**said: Any) -> FinetuneSettings:
    """The recipe of the dense model, with what was said on the command line in its place."""
    return _settings(FinetuneSettings(), said)


def _settings(base: FinetuneSettings, said: dict[str, Any]) -> FinetuneSettings:
    given = {name: value for name, value in said.items() if value is not None}
    epochs = given.get("epochs", base.epochs)
    given.setdefault("warmup_epochs", min(base.warmup_epochs, epochs / 4))
    return replace(base, **given)


def deciding(recipe: FinetuneSettings | None) -> dict[str, Any] | None:
    """What of a recipe decides the result."""
    if recipe is None:
        return None
    return {name: value for name, value in asdict(recipe).items() if name not in _FREE}
