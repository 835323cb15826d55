"""All that changes while training, and what of it a checkpoint holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from depgraph import DepgraphError
from domains.recipe import FinetuneSettings
from domains.running.device import borrowed
from domains.running.sharding import (
    broadcast,
    check_shardable,
    fsdp_plugin,
    load_whole,
    load_whole_optimizer,
    shard,
    whole,
)
from domains.training.algorithms import ERM
from domains.training.loss import Distillation


class EpochRow(TypedDict):
    """What one epoch came to; accuracies are shares in [0, 1]."""

    epoch: int  # from 1
    lr: float  # at the epoch's first step
    train_loss: float
    val_loss: float  # mean over the source domains
    val_accuracy: float  # mean over the source domains
    val_accuracies: dict[str, float]  # by source domain
    seconds: float


class Judgement(TypedDict):
    """The validation part of an `EpochRow`."""

    val_loss: float
    val_accuracy: float
    val_accuracies: dict[str, float]


@dataclass
class TrainState:
    """All that changes while training."""

    model: nn.Module  # what is trained: the caller's model, or a copy in shards
    trained: nn.Module  # the same, wrapped where several processes share the work
    whole: nn.Module  # the caller's model
    device: torch.device
    ema: ModelEmaV3 | None
    optimizer: Any  # accelerate's wrapper of a torch optimiser
    scheduler: Any  # timm's, stepped after every update
    algorithm: ERM
    distillation: Distillation | None
    beside: list[nn.Parameter]  # learnt with the model, but no part of it
    keep_last: bool
    history: list[EpochRow] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    before: Judgement | None = None  # of the model as it came, where that may be kept

    @property
    def sharded(self) -> bool:
        """Whether each process holds its part of the weights alone."""
        return self.model is not self.whole

    @contextmanager
    def judged(self, averaged: bool = True) -> Iterator[nn.Module]:
        """A whole model with the weights that are validated: the average where there is one.

        `averaged` False: the weights as they are.
        """
        if self.sharded:
            with self._gathered(self._chosen() if averaged else self.model.state_dict()) as model:
                yield model
        elif averaged and self.ema is not None:
            yield self.ema.module
        elif not averaged or (mean := self.algorithm.averaged()) is None:
            yield self.model
        else:
            own = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.model.load_state_dict(mean)
            try:
                yield self.model
            finally:
                self.model.load_state_dict(own)

    @contextmanager
    def edited(self) -> Iterator[nn.Module]:
        """A whole model as it is; what is done to its weights lasts."""
        if not self.sharded:
            yield self.model
            return
        with self._gathered(self.model.state_dict()) as model:
            yield model
            load_whole(self.model, model.state_dict())

    @contextmanager
    def _gathered(self, state: dict[str, Any]) -> Iterator[nn.Module]:
        self.whole.load_state_dict(whole(state))
        with borrowed(self.whole, self.device, train=True) as model:
            yield model

    def _chosen(self) -> dict[str, Any]:
        """The weights that are validated and returned."""
        if self.ema is not None:
            state: dict[str, Any] = self.ema.module.state_dict()
            return state
        averaged = self.algorithm.averaged()
        return self.model.state_dict() if averaged is None else averaged

    def add(self, row: EpochRow) -> None:
        """Take in a finished epoch, and its weights if they are the best so far."""
        self.history.append(row)
        if not self.best or self.keep_last or _rank(row) > _rank(self.best_judgement):
            self.best_epoch = row["epoch"]
            self._keep()

    def add_before(self, judgement: Judgement) -> None:
        """Take in what the model is worth before training: no epoch that is worse is kept."""
        self.before = judgement
        self._keep()

    def _keep(self) -> None:
        state = whole(self._chosen()) if self.sharded else self._chosen()
        self.best = {k: v.detach().clone() for k, v in state.items()}

    @property
    def best_judgement(self) -> Judgement | EpochRow:
        """Of the weights in `best`; epoch 0 is the model as it came."""
        if self.best_epoch == 0 and self.before is not None:
            return self.before
        return self.history[self.best_epoch - 1]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data and whole tensors for a checkpoint; all processes must call it."""
        plain = {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "algorithm": self.algorithm.state_dict(),
            "distillation": None if self.distillation is None else self.distillation.state_dict(),
            "history": self.history,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "before": self.before,
        }
        return whole(plain) if self.sharded else plain

    def load_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `to_dict` returned."""
        load_whole(self.model, state["model"])
        if self.ema is not None:
            load_whole(self.ema.module, state["ema"])
        load_whole_optimizer(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.algorithm.load_state_dict(state["algorithm"])
        if self.distillation is not None:
            self.distillation.load_state_dict(state["distillation"])
        self.history = state["history"]
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.before = state["before"]


def start(
    model: nn.Module,
    settings: FinetuneSettings,
    device: Accelerator,
    algorithm: ERM,
    distillation: Distillation | None,
) -> TrainState:
    """Return the state before the first step of a run."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise DepgraphError("every parameter of the model is frozen; set requires_grad on some")
    if settings.layer_decay < 1 and not hasattr(model, "group_matcher"):
        raise DepgraphError("layer_decay needs a timm model, which knows its layers; set it to 1")
    parts = [part for part in (algorithm, distillation) if part is not None]
    beside = [parameter for part in parts for parameter in part.parameters()]
    sharded = fsdp_plugin(device) is not None
    trained = model
    if sharded:
        check_shardable(model, settings.optimizer, device)
        broadcast(device, (t for t in model.state_dict().values() if isinstance(t, Tensor)))
        trained = shard(model, device)
    optimizer, scheduler = _optimizer(trained, settings, beside, algorithm.task.steps_per_epoch)
    ema = None
    if settings.ema_decay and not algorithm.averages:
        ema = ModelEmaV3(model, settings.ema_decay, use_warmup=True, foreach=not sharded)
        if sharded:
            ema.module = shard(ema.module, device)
    return TrainState(
        model=trained,
        trained=device.prepare(model) if device.num_processes > 1 and not sharded else trained,
        whole=model,
        device=device.device,
        ema=ema,
        optimizer=device.prepare(optimizer),
        scheduler=scheduler,
        algorithm=algorithm,
        distillation=distillation,
        beside=beside,
        keep_last=settings.keep == "last",
    )


def _optimizer(
    model: nn.Module, settings: FinetuneSettings, beside: list[nn.Parameter], steps_per_epoch: int
) -> tuple[Any, Any]:
    """timm's optimiser for the model and what is learnt beside it, and its schedule."""
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=settings.optimizer,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay if settings.layer_decay < 1 else None,
        )
        if beside:
            optimizer.add_param_group({"params": beside, "lr": settings.lr, "weight_decay": 0.0})
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=settings.schedule,
            num_epochs=settings.epochs,
            warmup_epochs=settings.warmup_epochs,  # type: ignore[arg-type]  # fractions work too
            warmup_lr=settings.lr / 100,
            min_lr=settings.lr / 100,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
    except ValueError as error:
        raise DepgraphError(
            f"timm takes no optimizer '{settings.optimizer}' with schedule '{settings.schedule}': "
            f"{error}"
        ) from error
    if scheduler is None:
        raise DepgraphError("schedule 'none' has no warm-up; for a fixed lr use 'constant'")
    return optimizer, scheduler


def _rank(row: Judgement | EpochRow) -> tuple[float, float]:
    return row["val_accuracy"], -row["val_loss"]
