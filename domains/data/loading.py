"""From samples to batches: order and augmentation are functions of (seed, epoch, place)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from depgraph import DepgraphError
from domains.data.folders import Sample
from domains.data.images import Transform, in_two, read_image
from domains.data.looks import in_random_look
from domains.running.random import derive_seed, seeded

Draw = tuple[int, int | None]  # index of a sample, seed of its augmentation (None: none)
Batch = tuple[Tensor, Tensor]  # images (batch, 3, height, width), labels (batch,)
Pixels = Mapping[Path, np.ndarray]


class ImageDataset(Dataset[Any]):
    """Samples under a transform; indexed by draws, so that the seed travels with the index.

    With `looks`, each draw shows its image in one of these, drawn by its seed.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Transform,
        pixels: Pixels | None = None,
        domains: Sequence[int] | None = None,
        looks: Sequence[str] = (),
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.looks = looks
        self.mixes = len(set(domains or ())) > 1
        self.pixels = pixels or {}
        self.domains = domains

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.samples)

    def __getitem__(self, draw: Draw) -> tuple[Any, ...]:
        """Return the transformed image, its label, and its domain's number where they are known."""
        index, seed = draw
        labels: tuple[int, ...] = (self.samples[index].label,)
        if self.domains is not None:
            labels += (self.domains[index],)
        with seeded(seed) if seed is not None else nullcontext():
            return (self._in_look(index) if self.looks else self._plain(index)), *labels

    def _plain(self, index: int) -> Tensor:
        return self.transform(self._image(index))

    def _in_look(self, index: int) -> Tensor:
        to_pixels, finish = in_two(self.transform)

        def other() -> Tensor:
            return to_pixels(self._image(self._elsewhere(index)))

        pixels = to_pixels(self._image(index))
        return finish(in_random_look(pixels, self.looks, other if self.mixes else None))

    def _elsewhere(self, index: int) -> int:
        """A sample of another domain, drawn."""
        assert self.domains is not None
        while True:
            drawn = int(torch.randint(len(self.samples), ()))
            if self.domains[drawn] != self.domains[index]:
                return drawn

    def _image(self, index: int) -> Image.Image:
        path = self.samples[index].path
        known = self.pixels.get(path)
        return read_image(path) if known is None else Image.fromarray(known)


class TrainOrder(Sampler[list[Draw]]):
    """Batches of one epoch of training; set `epoch` before iterating.

    Each pool (a domain, or all images) is a chain of fresh permutations, and the places of each
    batch are dealt to the pools in turn: equal shares a batch, every batch full, and an image is
    drawn again only after all others of its pool. Of several processes each gets its run of places
    of the same batch: equal shares for each, and together what one process would have.
    """

    def __init__(
        self,
        pools: Sequence[Sequence[int]],
        batch_size: int,
        seed: int,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.pools = pools
        self.batch_size = batch_size
        self.seed = seed
        self.shard, self.shards = shard
        self.epoch = 0
        if batch_size % self.shards:
            raise DepgraphError(
                f"batch_size {batch_size} cannot be shared by {self.shards} processes; make it a "
                f"multiple of {self.shards}"
            )

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
            order = rng.permutation(len(draws))
            share = len(draws) // self.shards
            yield [draws[i] for i in order if i // share == self.shard]


def _endless(pool: Sequence[int], rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from (pool[i] for i in rng.permutation(len(pool)))


def domain_numbers(train: Mapping[str, Sequence[Sample]]) -> list[int]:
    """Return the number of its domain for each of the concatenated samples."""
    return [number for number, samples in enumerate(train.values()) for _ in samples]


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


def eval_loader(
    dataset: ImageDataset, batch_size: int, workers: int, shard: tuple[int, int] = (0, 1)
) -> DataLoader[Batch]:
    """Return a loader of all samples, or of one process's share, once and in order."""
    first, step = shard
    draws: list[Draw] = [(index, None) for index in range(first, len(dataset), step)]
    return draw_loader(dataset, draws, batch_size, workers)


def draw_loader(
    dataset: ImageDataset, draws: Sequence[Draw], batch_size: int, workers: int = 0
) -> DataLoader[Batch]:
    """Return a loader of these draws, in order."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=draws,
        num_workers=workers,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
