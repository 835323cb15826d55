"""From samples to batches: order and augmentation are functions of (seed, epoch, place)."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from domains._images import Transform, read_image
from domains._random import derive_seed, seeded
from domains.folders import Sample

Draw = tuple[int, int | None]  # index of a sample, seed of its augmentation (None: none)
Batch = tuple[Tensor, Tensor]  # images (batch, 3, height, width), labels (batch,)
Pixels = Mapping[Path, np.ndarray]


class ImageDataset(Dataset[Any]):
    """Samples under a transform; indexed by draws, so that the seed travels with the index."""

    def __init__(
        self, samples: Sequence[Sample], transform: Transform, pixels: Pixels | None = None
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.pixels = pixels or {}

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.samples)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        """Return the transformed image and its label."""
        index, seed = draw
        sample = self.samples[index]
        known = self.pixels.get(sample.path)
        image = read_image(sample.path) if known is None else Image.fromarray(known)
        if seed is None:
            return self.transform(image), sample.label
        with seeded(seed):
            return self.transform(image), sample.label


class TrainOrder(Sampler[list[Draw]]):
    """Batches of one epoch of training; set `epoch` before iterating.

    Each pool (a domain, or all images) is a chain of fresh permutations, and the places of each
    batch are dealt to the pools in turn: equal shares a batch, every batch full, and an image is
    drawn again only after all others of its pool.
    """

    def __init__(self, pools: Sequence[Sequence[int]], batch_size: int, seed: int) -> None:
        self.pools = pools
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return -(-sum(map(len, self.pools)) // self.batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield the batches of `epoch`."""
        rng = np.random.default_rng(derive_seed(self.seed, "order", self.epoch))
        chains = [_endless(pool, rng) for pool in self.pools]
        for batch in range(len(self)):
            start = batch * self.batch_size
            places = range(start, start + self.batch_size)
            draws = [
                (
                    next(chains[place % len(chains)]),
                    derive_seed(self.seed, "augment", self.epoch, place),
                )
                for place in places
            ]
            # Mixup pairs a batch with its own mirror image: fixed places would pair fixed domains.
            yield [draws[i] for i in rng.permutation(len(draws))]


def _endless(pool: Sequence[int], rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from (pool[i] for i in rng.permutation(len(pool)))


def train_pools(train: Mapping[str, Sequence[Sample]], sampling: str) -> list[list[int]]:
    """Return index lists into the concatenated samples: one a domain if `equal`, else one."""
    pools, start = [], 0
    for samples in train.values():
        pools.append(list(range(start, start + len(samples))))
        start += len(samples)
    return pools if sampling == "equal" else [[i for pool in pools for i in pool]]


def interleave(domains: Mapping[str, Sequence[Sample]], seed: int) -> list[Sample]:
    """Return all samples, shuffled by `seed`, the domains taking turns from the first on."""
    shuffled = []
    for name, samples in domains.items():
        order = np.random.default_rng(derive_seed(seed, "batches", name)).permutation(len(samples))
        shuffled.append([samples[i] for i in order])
    return [sample for turn in zip_longest(*shuffled) for sample in turn if sample is not None]


def train_loader(dataset: ImageDataset, order: TrainOrder, workers: int) -> DataLoader[Batch]:
    """Return the loader of training batches; `order.epoch` says which."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # else the loader would draw from torch's global one
        pin_memory=torch.cuda.is_available(),
    )


def eval_loader(dataset: ImageDataset, batch_size: int, workers: int) -> DataLoader[Batch]:
    """Return a loader of all samples, once and in order."""
    draws: list[Draw] = [(index, None) for index in range(len(dataset))]
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=draws,
        num_workers=workers,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
