"""SWAD: the mean of all weights between the start of the valley of the validation loss and its end.

What is kept is one running mean: of the weights since the best validation so far, until that has
held for `patience_start` validations; from there on of everything up to the last good one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from depgraph import DepgraphError
from domains.running.sharding import placed_like
from domains.training.algorithms import ERM, Task, register


class _Mean:
    """Running mean of states; what is not a float is the last."""

    def __init__(self) -> None:
        self.count = 0
        self.state: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, state: dict[str, Tensor], count: int = 1) -> None:
        """Take in a state that stands for `count`."""
        self.count += count
        for name, value in state.items():
            mean = self.state.get(name)
            if mean is not None and value.is_floating_point():
                # A resumed mean is on the CPU, and whole.
                self.state[name] = placed_like(mean, value).lerp_(value, count / self.count)
            else:
                self.state[name] = value.detach().clone()

    def plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"count": self.count, "state": self.state}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> _Mean:
        """From what `plain` gave."""
        out = cls()
        out.count, out.state = plain["count"], dict(plain["state"])
        return out


@register
class SWAD(ERM):
    """Dense, overfit-aware averaging of weights over a flat minimum.

    Parameters
    ----------
    checks : int
        Validations an epoch; each costs a forward over the sources' validation parts.
    patience_start : int
        Validations after which the lowest loss counts as the start of the valley (N_s).
    patience_end : int
        Validations above the threshold after which the valley has ended (N_e).
    tolerance : float
        The threshold: this times the mean loss of the first `patience_start` validations (r).

    Notes
    -----
    Weights are averaged at every step, the loss is checked every few. The average is what is
    validated at the end of an epoch and returned; the moving average of the settings is not made.
    Where no start is found by the last step, the average is that since the lowest loss. Another
    algorithm's loss with these averages: ``class Both(SWAD, CORAL): name = "both"`` with a
    constructor that calls both.

    References
    ----------
    Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021 (algorithm 1).
    """

    name = "swad"
    averages = True

    def __init__(
        self,
        task: Task,
        *,
        checks: int = 4,
        patience_start: int = 3,
        patience_end: int = 6,
        tolerance: float = 1.3,
    ) -> None:
        super().__init__(task)
        for name, value in (("checks", checks), ("patience_start", patience_start)):
            if value < 1:
                raise DepgraphError(f"swad's {name} is {value}; give at least 1")
        self.every = max(1, task.steps_per_epoch // checks)
        self.patience_start, self.patience_end = patience_start, patience_end
        self.tolerance = tolerance
        self.step = 0
        self.losses: list[float] = []  # since the lowest, until the start; then those too high
        self.threshold: float | None = None  # None: the valley has not begun
        self.ended = False
        self.mean, self.pending = _Mean(), _Mean()

    @property
    def finished(self) -> bool:
        """Whether the end of the valley was found."""
        return self.ended

    def after_step(self, model: nn.Module, validation_loss: Callable[[], float]) -> None:
        """Average, and check the loss where it is time."""
        if self.ended:
            return
        self.step += 1
        state = model.state_dict()
        self.pending.add(state)
        if self.step % self.every == 0:
            self._check(validation_loss(), state)

    def _check(self, loss: float, state: dict[str, Tensor]) -> None:
        if self.threshold is None:
            if not self.losses or loss < self.losses[0]:
                self.losses, self.mean, self.pending = [], _Mean(), _Mean()
                self.pending.add(state)
            self.losses.append(loss)
            self._commit()
            if len(self.losses) >= self.patience_start:
                self.threshold = self.tolerance * sum(self.losses) / len(self.losses)
                self.losses = []
        elif loss <= self.threshold:
            self.losses = []
            self._commit()
        else:
            self.losses.append(loss)
            self.ended = len(self.losses) >= self.patience_end
            if self.ended:
                self.pending = _Mean()

    def _commit(self) -> None:
        if self.pending.count:
            self.mean.add(self.pending.state, self.pending.count)
        self.pending = _Mean()

    def averaged(self) -> dict[str, Tensor] | None:
        """The mean so far, that of weights whose check is still to come included."""
        whole = _Mean()
        for part in (self.mean, self.pending):
            if part.count:
                whole.add(part.state, part.count)
        return whole.state or None

    def get_extra_state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        plain = {name: getattr(self, name) for name in ("step", "losses", "threshold", "ended")}
        return {**plain, "mean": self.mean.plain(), "pending": self.pending.plain()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from what `get_extra_state` gave."""
        for name in ("step", "losses", "threshold", "ended"):
            setattr(self, name, state[name])
        self.mean = _Mean.of(state["mean"])
        self.pending = _Mean.of(state["pending"])
