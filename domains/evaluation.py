"""Accuracy per domain, and the batches that metrics look at; the model comes back as it was."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from depgraph import DepgraphError
from domains._device import accelerator, borrowed, loader_workers, mean_logits, shard_of
from domains._images import eval_transform
from domains._loading import Batch, ImageDataset, eval_loader, interleave
from domains._progress import progress_bar
from domains.folders import DomainData, Sample
from domains.split import Split

Samples = Split | DomainData | Mapping[str, Sequence[Sample]] | Sequence[Sample]


_log = logging.getLogger(__name__)


def evaluate(
    model: nn.Module,
    samples: Samples,
    *,
    batch_size: int = 64,
    device: str | None = None,
    amp: bool = False,
    img_size: int | None = None,
    num_workers: int | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Measure the share of images classified right, per domain.

    Several processes share the images, and all get the result.

    Parameters
    ----------
    model : nn.Module
        Maps images (batch, 3, height, width) to logits (batch, classes).
    samples : Split, DomainData, mapping of domain to samples, or samples
        Of a Split: each source domain's *validation* part and all of the target. Of plain samples:
        one entry named "all".
    batch_size, device, amp, img_size, num_workers
        As in `FinetuneSettings`.
    progress : bool
        Show a progress bar on standard error.

    Returns
    -------
    dict of str to float
        Accuracy in [0, 1] by domain, the target last.

    Raises
    ------
    DepgraphError
        Nothing to evaluate, an unreadable image, or logits that do not fit the classes.
    """
    by_domain = _by_domain(samples, validation=True)
    classes = len(samples.classes) if isinstance(samples, Split | DomainData) else None
    run = accelerator(device, amp)
    transform = eval_transform(model, img_size)
    workers = loader_workers(run.device, num_workers)
    accuracies: dict[str, float] = {}
    with borrowed(model, run.device, train=False), progress_bar(progress) as bar:
        for name, part in by_domain.items():
            dataset = ImageDataset(part, transform)
            loader = eval_loader(dataset, batch_size, workers, shard_of(run, len(part)))
            task = bar.add_task(f"evaluate {name}", total=len(loader))
            ticks = bar.track(loader, task_id=task, update_period=0.5)
            accuracies[name] = score(model, ticks, run, classes)[0]
            _log.info("accuracy on %s: %.1f%%", name, 100 * accuracies[name])
    return accuracies


def score(
    model: nn.Module, loader: Iterable[Batch], run: Accelerator, classes: int | None
) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy of a model already in eval mode on its device.

    Of several processes each gives its share of the batches; torchmetrics adds them up.
    `classes` None: not known, then the labels need only be among the outputs.
    """
    accuracy: MulticlassAccuracy | None = None
    loss = MeanMetric().to(run.device)
    with torch.no_grad():  # not inference_mode: what a model caches must still train later
        for images, labels in loader:
            labels = labels.to(run.device)
            with run.autocast():
                logits = mean_logits(model(images.to(run.device))).float()
            if accuracy is None:
                check_logits(logits, logits.shape[-1] if classes is None else classes)
                accuracy = MulticlassAccuracy(logits.shape[1], average="micro").to(run.device)
            if int(labels.max()) >= logits.shape[1]:
                raise DepgraphError(
                    f"label {int(labels.max())} is beyond the model's {logits.shape[1]} outputs; "
                    "create the model with as many classes as the data has"
                )
            accuracy.update(logits, labels)
            loss.update(functional.cross_entropy(logits, labels), weight=len(labels))
    if accuracy is None:
        raise DepgraphError("there are no images to evaluate on; give at least one")
    return float(accuracy.compute()), float(loss.compute())


def check_logits(logits: Tensor, classes: int) -> None:
    """Raise unless the logits are (batch, classes)."""
    if logits.ndim != 2 or logits.shape[1] != classes:
        raise DepgraphError(
            f"the model gives outputs of shape {tuple(logits.shape[1:])} an image, but the data "
            f"has {classes} classes; create the model with num_classes={classes}"
        )


@dataclass(frozen=True)
class Batches:
    """Batches of (images, labels) on the model's device; can be gone through many times."""

    model: nn.Module
    dataset: ImageDataset
    batch_size: int

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield (batch, 3, height, width) float images, normalised, and (batch,) labels."""
        device = next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))
        for images, labels in eval_loader(self.dataset, self.batch_size, 0):
            yield images.to(device), labels.to(device)


def batches(
    model: nn.Module,
    samples: Samples,
    *,
    batch_size: int = 32,
    seed: int = 0,
    num_samples: int | None = None,
    img_size: int | None = None,
) -> Batches:
    """Return images for metrics and compensation, without augmentation.

    Parameters
    ----------
    model : nn.Module
        Decides image size, normalisation and device.
    samples : Split, DomainData, mapping of domain to samples, or samples
        Of a Split: the *training* part of each source; neither validation nor target.
    batch_size : int
        Images a batch; the last may have fewer.
    seed : int
        Decides the order. Domains take turns, so that any beginning is balanced over them.
    num_samples : int or None
        Stop after this many images; None: all.
    img_size : int or None
        None: the size the model was built for.

    Raises
    ------
    DepgraphError
        Fewer images than `num_samples`, or none.
    """
    order = interleave(_by_domain(samples, validation=False), seed)
    if not order or (num_samples is not None and not 1 <= num_samples <= len(order)):
        raise DepgraphError(f"{num_samples} images wanted of {len(order)}; ask for 1 to that many")
    dataset = ImageDataset(order[:num_samples], eval_transform(model, img_size))
    return Batches(model, dataset, batch_size)


def _by_domain(samples: Samples, validation: bool) -> dict[str, Sequence[Sample]]:
    if isinstance(samples, Split):
        if not validation:
            return dict(samples.train)
        return {**samples.val, samples.target: samples.test}
    if isinstance(samples, DomainData):
        return dict(samples.samples)
    if isinstance(samples, Mapping):
        return dict(samples)
    return {"all": samples}
