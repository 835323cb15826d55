"""One epoch of fine-tuning: train on the sources' training parts, judge on their validation."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from rich.progress import Progress
from torch import Tensor, nn

from depgraph import DepgraphError
from domains.data.images import eval_transform, read_all, train_transform
from domains.data.loading import (
    ImageDataset,
    TrainOrder,
    domain_numbers,
    eval_loader,
    train_loader,
    train_pools,
)
from domains.data.looks import TO_TRAIN
from domains.data.split import Split
from domains.measuring.evaluation import check_logits, score
from domains.recipe import FinetuneSettings
from domains.running.device import (
    all_logits,
    gathered,
    loader_workers,
    mean_gradients,
    mean_over,
    shard_of,
)
from domains.running.random import derive_seed, seeded
from domains.running.sharding import broadcast, whole_units
from domains.training.algorithms import Step, Task, make_algorithm
from domains.training.features import Features, token_shape
from domains.training.loss import Distillation, Output, sample_losses
from domains.training.state import EpochRow, Judgement, TrainState


@dataclass(frozen=True)
class Hooks:
    """What else is done to the model while it trains; nothing of it may last but in its weights.

    Parameters
    ----------
    name : str
        Says what it is, with all that decides it: a checkpoint of other hooks is refused.
    after_step : callable or None
        Called after an update with the model and the shares of the training that were done before
        and are done after it.
    after_epoch : callable or None
        Called after an epoch's last update, before it is validated, with the model and the share
        of the training that is done.
    """

    name: str
    after_step: Callable[[nn.Module, float, float], None] | None = None
    after_epoch: Callable[[nn.Module, float], None] | None = None


class EpochRunner:
    """The fixed part of a run: data, losses, device; `run` does one epoch on a `TrainState`."""

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        settings: FinetuneSettings,
        device: Accelerator,
        teacher: nn.Module | None,
        hooks: Hooks | None,
        bar: Progress,
    ) -> None:
        self.settings, self.device, self.bar = settings, device, bar
        self.teacher, self.hooks = teacher, hooks
        self.classes = len(split.classes)
        train = [sample for part in split.train.values() for sample in part]
        val = [sample for part in split.val.values() for sample in part]
        pixels = read_all([sample.path for sample in train + val], settings.cache_mib)
        workers = loader_workers(device.device, settings.num_workers)
        pools = train_pools(split.train, settings.sampling)
        self.order = TrainOrder(pools, settings.batch_size, settings.seed, shard_of(device))
        transform, numbers = train_transform(model, settings), domain_numbers(split.train)
        dataset = ImageDataset(train, transform, pixels, numbers, TO_TRAIN[settings.looks])
        self.train_batches = train_loader(dataset, self.order, workers)
        transform = eval_transform(model, settings.img_size)
        self.val_batches = {
            name: eval_loader(
                ImageDataset(part, transform, pixels), 64, workers, shard_of(device, len(part))
            )
            for name, part in split.val.items()
        }
        self.algorithm = make_algorithm(
            settings,
            Task(
                num_classes=self.classes,
                num_domains=len(split.train),
                steps_per_epoch=len(self.order),
                batch_size=settings.batch_size // device.num_processes,
                mixup=settings.mixup,
                cutmix=settings.cutmix,
                smoothing=settings.smoothing,
            ),
        ).to(device.device)
        self.distillation = self._distillation(model)
        self.student: Features | None = None  # of the model as it trains, which `start` makes
        self.shown = None
        if self._compares_features and teacher is not None:
            self.shown = Features(teacher, with_tokens=True)
        self.task = bar.add_task("train", total=len(self.order))

    @property
    def _compares_features(self) -> bool:
        return self.teacher is not None and self.settings.feature_weight > 0

    def _distillation(self, model: nn.Module) -> Distillation | None:
        if self.teacher is None:
            return None
        shapes = None
        if self._compares_features:
            images = next(iter(next(iter(self.val_batches.values()))))[0][:1]
            model.eval()
            shapes = token_shape(model, images), token_shape(self.teacher, images)
        return Distillation(self.settings, shapes).to(self.device.device)

    def run(self, state: TrainState, epoch: int) -> EpochRow:
        """Train and validate epoch number `epoch` (from 0)."""
        began = time.perf_counter()
        lr = max(group["lr"] for group in state.optimizer.param_groups)
        self.bar.reset(self.task, description=f"epoch {epoch + 1}/{self.settings.epochs}")
        cuda = (self.device.device,) if self.device.device.type == "cuda" else ()
        place = (self.device.process_index,) if self.device.process_index else ()
        with seeded(derive_seed(self.settings.seed, "epoch", epoch, *place), cuda):
            train_loss = self._train(state, epoch)
        if self.hooks is not None and self.hooks.after_epoch is not None:
            with state.edited() as model:
                self.hooks.after_epoch(model, (epoch + 1) / self.settings.epochs)
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
        with state.judged() as model:
            return self._validate(model)

    def _validate(self, model: nn.Module) -> Judgement:
        model.eval()
        scores = {
            name: score(model, loader, self.device, self.classes)
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
        with ExitStack() as stack:
            if self.algorithm.needs_features or self._compares_features:
                watch = Features(state.model, with_tokens=self._compares_features)
                self.student = stack.enter_context(watch)
            if self.shown is not None:
                stack.enter_context(self.shown)
            for step, batch in enumerate(self.train_batches, epoch * len(self.order) + 1):
                value = self._step(state, *(part.to(self.device.device) for part in batch))
                if not math.isfinite(value):
                    lr = max(group["lr"] for group in state.optimizer.param_groups)
                    raise DepgraphError(
                        f"the loss became {value} in epoch {epoch + 1} at lr {lr:.3g}; lower the "
                        "lr or train without mixed precision (the checkpoint of the epoch before "
                        "is kept)"
                    )
                self._after_step(state, step)
                total += value
                self.bar.update(self.task, advance=1)
        return total / len(self.order)

    def _after_step(self, state: TrainState, step: int) -> None:
        state.scheduler.step_update(step)
        if self.device.num_processes > 1:
            # What batch norm has seen: that of the main process, in all averages too.
            floats = (b for b in state.model.buffers() if b.is_floating_point())
            broadcast(self.device, floats)
        if self.hooks is not None and self.hooks.after_step is not None:
            steps = len(self.order) * self.settings.epochs
            with state.edited() as model:
                self.hooks.after_step(model, (step - 1) / steps, step / steps)
        if state.ema is not None:
            state.ema.update(state.model, step)

        def validation_loss() -> float:
            with state.judged(averaged=False) as model:
                loss = self._validate(model)["val_loss"]
            state.model.train()
            return loss

        self.algorithm.after_step(state.model, validation_loss)

    def _step(self, state: TrainState, images: Tensor, labels: Tensor, domains: Tensor) -> float:
        images, targets = self.algorithm.prepare(images, labels)
        with self.device.autocast():
            with whole_units():
                output = state.trained(images)
            for logits in all_logits(output):
                check_logits(logits, self.classes)
            loss = self._loss(output, targets, domains)
            if self.distillation is not None:
                loss = (1 - self.settings.distill_weight) * loss + self._distance(output, images)
        state.optimizer.zero_grad()
        self.device.backward(loss)
        mean_gradients(self.device, state.beside)
        if self.settings.clip_grad is not None:
            self.device.clip_grad_norm_(state.model.parameters(), self.settings.clip_grad)
        state.optimizer.step()
        return float(mean_over(self.device, loss.detach()))

    def _loss(self, output: Output, targets: Tensor, domains: Tensor) -> Tensor:
        """The algorithm's loss over the batch of all processes."""
        features = None
        if self.algorithm.needs_features and self.student is not None:
            features = gathered(self.device, self.student.value.float())
        losses = sample_losses(output, targets, self.settings.smoothing)
        losses, domains = gathered(self.device, losses), gathered(self.device, domains)
        return self.algorithm.loss(Step(losses, domains, features))

    def _distance(self, output: Output, images: Tensor) -> Tensor:
        """How far the model is from its teacher."""
        assert self.teacher is not None and self.distillation is not None
        with torch.no_grad():
            wanted = self.teacher(images)
        if self.student is None or self.shown is None:
            return self.distillation(output, wanted)
        return self.distillation(output, wanted, self.student.tokens, self.shown.tokens)
