"""PACS as hdf5: `<domain>_train.hdf5`, `_val`, `_test`, with `images` uint8 and `labels` from 1.

The one thing to know: `_test` holds the whole domain, `_train` and `_val` included. What was
written from those is not written again, so that any of the files may be given together.
"""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from depgraph import DepgraphError
from domains.data.archives import Member
from domains.data.known import KNOWN

_NAME = re.compile(r"(?P<domain>.+)_(?P<part>train|val|test)$")
_CHUNK = 256  # images read at once: 40 MB at 227 px


class Hdf5Source:
    """The images of the hdf5 files of one domain, written as PNG: the same pixels, losslessly."""

    def __init__(self, domain: str, paths: Sequence[Path]) -> None:
        # train and val before test, which repeats them
        self.paths = sorted(paths, key=lambda path: ("train", "val", "test").index(_part(path)[1]))
        self.name = ", ".join(path.name for path in self.paths)
        self.domain = domain
        self.skipped = 0
        self.members: list[Member] = []
        self._places: dict[tuple[Path, int], Member] = {}
        known: Counter[tuple[bytes, int]] = Counter()
        for path in self.paths:
            repeats = _part(path)[1] == "test"
            for index, image, label in _images(path):
                key = hashlib.sha256(image.tobytes()).digest(), label
                if repeats and known[key] > 0:
                    known[key] -= 1
                    continue
                if not repeats:
                    known[key] += 1
                self._add(path, index, label, image.nbytes)

    def _add(self, path: Path, index: int, label: int, size: int) -> None:
        file = f"{_part(path)[1]}_{index:05d}.png"
        member = Member(self.domain, KNOWN["PACS"].classes[label - 1], file, size)
        self._places[path, index] = member
        self.members.append(member)

    def read(self, unwanted: Container[str]) -> Iterator[tuple[Member, bytes]]:
        """Yield each image as the content of a PNG file."""
        for path in self.paths:
            for index, image, _ in _images(path):
                member = self._places.get((path, index))
                if member is not None and member.path not in unwanted:
                    buffer = io.BytesIO()
                    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
                    yield member, buffer.getvalue()


def by_domain(paths: Sequence[Path]) -> list[Hdf5Source]:
    """Return one source a domain."""
    domains: dict[str, list[Path]] = {}
    for path in paths:
        domains.setdefault(_part(path)[0], []).append(path)
    return [Hdf5Source(domain, group) for domain, group in domains.items()]


def _part(path: Path) -> tuple[str, str]:
    found = _NAME.match(path.stem)
    if found is None:
        raise DepgraphError(
            f"the name of {path} says no domain; PACS's files are called <domain>_train.hdf5, "
            "<domain>_val.hdf5 and <domain>_test.hdf5"
        )
    return found["domain"], found["part"]


def _images(path: Path) -> Iterator[tuple[int, np.ndarray, int]]:
    """Yield (index, pixels (height, width, 3), label from 1) of a file."""
    h5py = _h5py()
    try:
        with h5py.File(path, "r") as file:
            images, labels = _datasets(file, path)
            for start in range(0, len(images), _CHUNK):
                chunk = images[start : start + _CHUNK]
                for offset, (image, label) in enumerate(
                    zip(chunk, labels[start : start + _CHUNK], strict=True)
                ):
                    yield start + offset, image, int(label)
    except OSError as error:
        raise DepgraphError(f"cannot read the hdf5 file {path}: {error}") from error


def _datasets(file: Any, path: Path) -> tuple[Any, np.ndarray]:
    for name in ("images", "labels"):
        # No link of the file may lead to another file, nor may its data lie in one.
        if not isinstance(file.get(name, getlink=True), _h5py().HardLink) or file[name].external:
            raise DepgraphError(f"{path} has no '{name}' of its own; PACS's hdf5 files have both")
    images, labels = file["images"], np.asarray(file["labels"]).reshape(-1)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise DepgraphError(
            f"'images' of {path} is {images.dtype} {tuple(images.shape)}; expected uint8 "
            "(N, height, width, 3)"
        )
    classes = len(KNOWN["PACS"].classes)
    if (
        len(labels) != len(images)
        or labels.size == 0
        or not np.isin(labels, range(1, 1 + classes)).all()
    ):
        raise DepgraphError(
            f"'labels' of {path} are not one number from 1 to {classes} for each of its "
            f"{len(images)} images"
        )
    return images, labels


def _h5py() -> Any:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise DepgraphError(
            "hdf5 files need h5py; install it with: pip install 'depgraph-prune[data]'"
        ) from error
    return h5py
