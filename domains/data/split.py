"""Leave one domain out: the sources split into train and validation, the target kept for the test.

The split is a function of the seed and the file names alone: the same on every machine, in every
order of files, and with or without the target domain's images.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from depgraph import DepgraphError
from domains.data.folders import DomainData, Sample, check_name


@dataclass(frozen=True)
class Split:
    """Training and validation samples of each source domain, and all samples of the target."""

    classes: tuple[str, ...]
    target: str
    train: dict[str, tuple[Sample, ...]]
    val: dict[str, tuple[Sample, ...]]
    test: tuple[Sample, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """The source domains, sorted."""
        return tuple(self.train)


def leave_one_out(
    data: DomainData,
    target: str,
    *,
    seed: int = 0,
    split_by: Literal["image", "stem"] = "image",
    val_share: float = 0.2,
) -> Split:
    """Split each source domain into train and validation, stratified by class.

    Parameters
    ----------
    data : DomainData
        What `load_domains` returned.
    target : str
        The domain left out; none of its files has any part in the split.
    seed : int
        Another seed, another split.
    split_by : "image" or "stem"
        "image": each image for itself, each domain and class exactly by `val_share`. "stem": files
        of one class with the same name but for the ending are on one side in *all* sources, for
        data where the same name is the same object.
    val_share : float
        Share of the images for validation, in (0, 1); rounded, at least one a class where the
        class has two.

    Raises
    ------
    DepgraphError
        Unknown target or option, no source left, or a source with no image for one side.

    References
    ----------
    Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021 (the protocol).
    """
    check_name(target, data.samples, "target domain", data.root)
    if split_by not in ("image", "stem"):
        raise DepgraphError(f"split_by is 'image' or 'stem', not '{split_by}'")
    if not 0 < val_share < 1:
        raise DepgraphError(f"val_share {val_share} is not between 0 and 1; 0.2 is usual")
    sources = {name: data.samples[name] for name in sorted(data.samples) if name != target}
    if not sources:
        raise DepgraphError(f"{data.root} has no domain but the target '{target}'; add a source")
    chosen = frozenset(_validation_keys(sources, split_by, seed, val_share))
    train: dict[str, tuple[Sample, ...]] = {}
    val: dict[str, tuple[Sample, ...]] = {}
    for name, samples in sources.items():
        sides: tuple[list[Sample], list[Sample]] = ([], [])
        for sample in samples:
            sides[_key(name, sample, split_by) in chosen].append(sample)
        train[name], val[name] = tuple(sides[0]), tuple(sides[1])
        if not train[name] or not val[name]:
            side = "validation" if train[name] else "training"
            raise DepgraphError(
                f"source domain '{name}' has no image left for {side}; add images or change "
                "val_share or split_by"
            )
    return Split(data.classes, target, train, val, data.samples[target])


_Key = tuple[str, int, str]  # ("" or domain, label, stem or file name): what moves as one


def _key(domain: str, sample: Sample, split_by: str) -> _Key:
    if split_by == "stem":
        return "", sample.label, sample.path.stem
    return domain, sample.label, sample.path.name


def _validation_keys(
    sources: dict[str, tuple[Sample, ...]], split_by: str, seed: int, share: float
) -> Iterator[_Key]:
    held_by: defaultdict[_Key, set[str]] = defaultdict(set)
    for name, samples in sources.items():
        for sample in samples:
            held_by[_key(name, sample, split_by)].add(name)
    strata: defaultdict[tuple[str, int], list[_Key]] = defaultdict(list)
    for key in held_by:
        strata[key[:2]].append(key)
    for keys in strata.values():
        # Ordered by which domains hold the stem, then at random: evenly spaced picks then take
        # the same share of what two domains have in common and of what only one has.
        keys.sort(key=lambda key: (sorted(held_by[key]), _digest(seed, key)))
        yield from _evenly_spaced(keys, share)


def _evenly_spaced(keys: Sequence[_Key], share: float) -> list[_Key]:
    count = min(max(1, round(share * len(keys))), len(keys) - 1)
    return [keys[(2 * i + 1) * len(keys) // (2 * count)] for i in range(count)]


def _digest(seed: int, key: _Key) -> bytes:
    return hashlib.sha256(repr((seed, *key)).encode()).digest()
