"""Schedules put together: what `pruners` does to weights becomes hooks of a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from domains import ALGORITHMS, FinetuneSettings, Hooks
from pruners import PlannedCut, schedules

SCHEDULES = ("one-shot", "iterative", "regularised", "soft")

STEPS, STEP_EPOCHS = 3, 2
"""Cuts of an iterative schedule, and epochs of each training before the last cut."""


@dataclass(frozen=True)
class Schedule:
    """How the cut comes about.

    Attributes
    ----------
    name : str
        One of `SCHEDULES`.
    steps : int
        Cuts; more than one only where it is ``"iterative"``.
    training : FinetuneSettings or None
        Of each training before the last cut; None where there is none.
    """

    name: str = "one-shot"
    steps: int = 1
    training: FinetuneSettings | None = None

    @property
    def shrinks(self) -> bool:
        """Whether units are shrunk in training before they are cut."""
        return self.name in ("regularised", "soft")


def shrinking_settings(training: FinetuneSettings) -> FinetuneSettings:
    """The settings for a training that shrinks units.

    Averages of weights would keep what the units were; the best epoch is the last, whose units are
    smallest.
    """
    averages = ALGORITHMS[training.algorithm].averages
    plain: dict[str, Any] = {"algorithm": "erm", "algorithm_args": {}} if averages else {}
    return replace(training, keep="last", may_keep_start=False, ema_decay=0.0, **plain)


def shrinking_hooks(
    schedule: str, planned: PlannedCut, plan: Callable[[nn.Module], PlannedCut], name: str
) -> Hooks:
    """What shrinks the units to go while a model trains.

    Parameters
    ----------
    schedule : str
        ``"regularised"``: those of `planned`, at every step; ``"soft"``: those that `plan` gives
        for the model at the end of each epoch.
    planned : PlannedCut
        For the model before it is trained.
    plan : callable
        Takes a model and gives its cut.
    name : str
        All that decides the cut, for the checkpoint.
    """
    if schedule == "regularised":
        shrink = schedules.shrinker(planned.graph, schedules.units_to_go(planned.plan))

        def after_step(model: nn.Module, before: float, after: float) -> None:
            shrink(model, schedules.growing_decay(before, after))

        return Hooks(name, after_step=after_step)

    def after_epoch(model: nn.Module, done: float) -> None:
        cut = plan(model.eval())
        shrink = schedules.shrinker(cut.graph, schedules.units_to_go(cut.plan))
        shrink(model, schedules.soft_factor(done))

    return Hooks(name, after_epoch=after_epoch)
