"""Accuracy per domain, and the batches that metrics look at; the model comes back as it was."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from depgraph import DepgraphError
from domains.data.folders import DomainData, Sample
from domains.data.images import IMAGE_SUFFIXES, eval_transform
from domains.data.loading import Batch, Draw, ImageDataset, draw_loader, eval_loader, interleave
from domains.data.looks import TO_CALIBRATE
from domains.data.split import Split
from domains.running.device import accelerator, borrowed, loader_workers, mean_logits, shard_of
from domains.running.progress import progress_bar
from domains.running.random import derive_seed

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
    draws: Sequence[Draw]

    @property
    def num_samples(self) -> int:
        """Images of all batches."""
        return len(self.draws)

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.draws) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield (batch, 3, height, width) float images, normalised, and (batch,) labels."""
        device = next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))
        for images, labels, *_ in draw_loader(self.dataset, self.draws, self.batch_size):
            yield images.to(device), labels.to(device)


def batches(
    model: nn.Module,
    samples: Samples,
    *,
    batch_size: int = 32,
    seed: int = 0,
    num_samples: int | None = None,
    img_size: int | None = None,
    looks: bool = False,
) -> Batches:
    """Return images for metrics and compensation, without the augmentation of a training.

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
        Stop after this many images; None: all, in looks `IN_LOOKS`, or `TIMES` each of fewer.
    img_size : int or None
        None: the size the model was built for.
    looks : bool
        Show each in a random look (`domains.data.looks`), each time that it comes in another:
        what is fitted to one look alone is not kept for any other.

    Raises
    ------
    DepgraphError
        Fewer images than `num_samples`, where each comes once, or none.
    """
    parts = _by_domain(samples, validation=False)
    order = interleave(parts, seed)
    most = len(order) if not looks else None
    if not order or (num_samples is not None and not 1 <= num_samples <= (most or num_samples)):
        raise DepgraphError(f"{num_samples} images wanted of {len(order)}; ask for 1 to that many")
    transform = eval_transform(model, img_size)
    if not looks:
        dataset = ImageDataset(order[:num_samples], transform)
        return Batches(model, dataset, batch_size, [(i, None) for i in range(len(dataset))])
    numbers = {sample.path: n for n, part in enumerate(parts.values()) for sample in part}
    dataset = ImageDataset(order, transform, None, [numbers[s.path] for s in order], TO_CALIBRATE)
    count = num_samples or min(IN_LOOKS, TIMES * len(order))
    draws = [(i % len(order), derive_seed(seed, "look", i)) for i in range(count)]
    return Batches(model, dataset, batch_size, draws)


IN_LOOKS = 2048
"""Images in looks where nothing is said: more looks keep more of domains that were not seen."""

TIMES = 8
"""How often each image comes at most, where nothing is said."""


def folder_batches(
    model: nn.Module,
    folder: str | Path,
    *,
    batch_size: int = 32,
    seed: int = 0,
    img_size: int | None = None,
) -> Batches:
    """Return all images below a folder, in a random order; the labels mean nothing.

    Parameters
    ----------
    model : nn.Module
        Decides image size, normalisation and device.
    folder : path
        Files that are no images are left out.
    batch_size, seed, img_size
        As of `batches`.

    Raises
    ------
    DepgraphError
        No folder, or no image in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DepgraphError(f"no folder {root}; give one with images for the calibration")
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not paths:
        raise DepgraphError(f"{root} holds no image; give a folder with images")
    samples = [Sample(path, 0) for path in paths]
    return batches(model, samples, batch_size=batch_size, seed=seed, img_size=img_size)


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
