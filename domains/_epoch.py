"""One epoch of fine-tuning: train on the sources' training parts, judge on their validation."""

import math
import time
from dataclasses import dataclass, field
from typing import Any, TypedDict

from accelerate import Accelerator
from rich.progress import Progress
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from depgraph import DepgraphError
from domains._device import all_logits, loader_workers
from domains._images import eval_transform, read_all, train_transform
from domains._loading import ImageDataset, TrainOrder, eval_loader, train_loader, train_pools
from domains._loss import make_loss, make_mixup
from domains._random import derive_seed, seeded
from domains.evaluation import check_logits, score
from domains.recipe import FinetuneSettings
from domains.split import Split


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

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: Any  # accelerate's wrapper of a torch optimiser
    scheduler: Any  # timm's, stepped after every update
    history: list[EpochRow] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    before: Judgement | None = None  # of the model as it came, where that may be kept

    @property
    def judged(self) -> nn.Module:
        """The weights that are validated and returned: the average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def add(self, row: EpochRow) -> None:
        """Take in a finished epoch, and its weights if they are the best so far."""
        self.history.append(row)
        if not self.best or _rank(row) > _rank(self.best_judgement):
            self.best_epoch = row["epoch"]
            self._keep()

    def add_before(self, judgement: Judgement) -> None:
        """Take in what the model is worth before training: no epoch that is worse is kept."""
        self.before = judgement
        self._keep()

    def _keep(self) -> None:
        self.best = {k: v.detach().clone() for k, v in self.judged.state_dict().items()}

    @property
    def best_judgement(self) -> Judgement | EpochRow:
        """Of the weights in `best`; epoch 0 is the model as it came."""
        if self.best_epoch == 0 and self.before is not None:
            return self.before
        return self.history[self.best_epoch - 1]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data and tensors for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "before": self.before,
        }

    def load_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `to_dict` returned."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.history = state["history"]
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.before = state["before"]


def start(
    model: nn.Module, settings: FinetuneSettings, device: Accelerator, steps: int
) -> TrainState:
    """Return the state before the first step of a run with `steps` updates an epoch."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise DepgraphError("every parameter of the model is frozen; set requires_grad on some")
    if settings.layer_decay < 1 and not hasattr(model, "group_matcher"):
        raise DepgraphError("layer_decay needs a timm model, which knows its layers; set it to 1")
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=settings.optimizer,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay if settings.layer_decay < 1 else None,
        )
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=settings.schedule,
            num_epochs=settings.epochs,
            warmup_epochs=settings.warmup_epochs,  # type: ignore[arg-type]  # fractions work too
            warmup_lr=settings.lr / 100,
            min_lr=settings.lr / 100,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
    except ValueError as error:
        raise DepgraphError(
            f"timm takes no optimizer '{settings.optimizer}' with schedule '{settings.schedule}': "
            f"{error}"
        ) from error
    if scheduler is None:
        raise DepgraphError("schedule 'none' has no warm-up; for a fixed lr use 'constant'")
    ema = ModelEmaV3(model, settings.ema_decay, use_warmup=True) if settings.ema_decay else None
    return TrainState(model, ema, device.prepare(optimizer), scheduler)


class EpochRunner:
    """The fixed part of a run: data, loss, device; `run` does one epoch on a `TrainState`."""

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        settings: FinetuneSettings,
        device: Accelerator,
        teacher: nn.Module | None,
        bar: Progress,
    ) -> None:
        self.settings, self.device, self.bar = settings, device, bar
        self.classes = len(split.classes)
        self.loss = make_loss(settings, teacher)
        self.mixup = make_mixup(settings, self.classes)
        train = [sample for part in split.train.values() for sample in part]
        val = [sample for part in split.val.values() for sample in part]
        pixels = read_all([sample.path for sample in train + val], settings.cache_mib)
        workers = loader_workers(device.device, settings.num_workers)
        pools = train_pools(split.train, settings.sampling)
        self.order = TrainOrder(pools, settings.batch_size, settings.seed)
        dataset = ImageDataset(train, train_transform(model, settings), pixels)
        self.train_batches = train_loader(dataset, self.order, workers)
        transform = eval_transform(model, settings.img_size)
        self.val_batches = {
            name: eval_loader(ImageDataset(part, transform, pixels), 64, workers)
            for name, part in split.val.items()
        }
        self.task = bar.add_task("train", total=len(self.order))

    def run(self, state: TrainState, epoch: int) -> EpochRow:
        """Train and validate epoch number `epoch` (from 0)."""
        began = time.perf_counter()
        lr = max(group["lr"] for group in state.optimizer.param_groups)
        self.bar.reset(self.task, description=f"epoch {epoch + 1}/{self.settings.epochs}")
        cuda = (self.device.device,) if self.device.device.type == "cuda" else ()
        with seeded(derive_seed(self.settings.seed, "epoch", epoch), cuda):
            train_loss = self._train(state, epoch)
        judgement = self.judge(state)
        return {
            "epoch": epoch + 1,
            "lr": lr,
            "train_loss": train_loss,
            "val_loss": judgement["val_loss"],
            "val_accuracy": judgement["val_accuracy"],
            "val_accuracies": judgement["val_accuracies"],
            "seconds": time.perf_counter() - began,
        }

    def judge(self, state: TrainState) -> Judgement:
        """Validate on the source domains."""
        state.judged.eval()
        scores = {
            name: score(state.judged, loader, self.device, self.classes)
            for name, loader in self.val_batches.items()
        }
        return {
            "val_loss": sum(loss for _, loss in scores.values()) / len(scores),
            "val_accuracy": sum(accuracy for accuracy, _ in scores.values()) / len(scores),
            "val_accuracies": {name: accuracy for name, (accuracy, _) in scores.items()},
        }

    def _train(self, state: TrainState, epoch: int) -> float:
        self.order.epoch = epoch
        state.model.train()
        total = 0.0
        for step, (images, labels) in enumerate(self.train_batches, epoch * len(self.order) + 1):
            value = self._step(state, images.to(self.device.device), labels.to(self.device.device))
            if not math.isfinite(value):
                lr = max(group["lr"] for group in state.optimizer.param_groups)
                raise DepgraphError(
                    f"the loss became {value} in epoch {epoch + 1} at lr {lr:.3g}; lower the lr or "
                    "train without mixed precision (the checkpoint of the epoch before is kept)"
                )
            state.scheduler.step_update(step)
            if state.ema is not None:
                state.ema.update(state.model, step)
            total += value
            self.bar.update(self.task, advance=1)
        return total / len(self.order)

    def _step(self, state: TrainState, images: Tensor, labels: Tensor) -> float:
        targets = labels
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
        with self.device.autocast():
            output = state.model(images)
            for logits in all_logits(output):
                check_logits(logits, self.classes)
            loss = self.loss(output, images, targets)
        state.optimizer.zero_grad()
        self.device.backward(loss)
        if self.settings.clip_grad is not None:
            self.device.clip_grad_norm_(state.model.parameters(), self.settings.clip_grad)
        state.optimizer.step()
        return float(loss.detach())


def _rank(row: Judgement | EpochRow) -> tuple[float, float]:
    return row["val_accuracy"], -row["val_loss"]
