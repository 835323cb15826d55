"""Safetensors checkpoints larger than memory: read and written a piece at a time.

The layout is that of transformers and timm: ``model.safetensors.index.json`` beside its shards, or
one ``model.safetensors``. Safetensors' own writer wants whole tensors, so shards are written here:
the format is a length, a JSON header and the tensors' bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from depgraph.errors import DepgraphError
from depgraph.files import replacing
from depgraph.storing.reading import inside, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

PIECE_BYTES = 32 << 20
"""Bytes of a tensor that are read at once; more only where a single row is longer."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SHARD = re.compile(r"\w[\w.-]{0,200}\.safetensors", re.ASCII)


def is_storable(dtype: torch.dtype) -> bool:
    """Whether safetensors has a name for a dtype."""
    return dtype in _NAMES


@dataclass(frozen=True)
class Stored:
    """Where a tensor of a checkpoint is, and what it is."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """What a directory of safetensors holds; nothing of the tensors is read yet.

    Attributes
    ----------
    directory : Path
    tensors : dict of str to Stored
    files : tuple of str
        The shards, in order of their names.

    Raises
    ------
    DepgraphError
        When there is no checkpoint, or a shard is missing, damaged or of an unknown dtype.
    """

    def __init__(self, directory: str | PathLike[str]) -> None:
        self.directory = Path(directory)
        self.files = weight_files(self.directory)
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            with self._open(file) as shard:
                for name in shard.keys():  # noqa: SIM118  it is no dict
                    view = shard.get_slice(name)
                    kind = view.get_dtype()
                    if kind not in _DTYPES:
                        raise DepgraphError(
                            f"'{self.directory / file}': '{name}' has dtype {kind}, which is not "
                            f"one of {', '.join(_DTYPES)}; convert the checkpoint first"
                        )
                    shape = tuple(view.get_shape())
                    self.tensors[name] = Stored(file, shape, _DTYPES[kind])

    def _open(self, file: str) -> Any:
        path = inside(self.directory, file)
        try:
            return safe_open(path, framework="pt")
        except OSError as error:
            raise DepgraphError(f"cannot read '{path}': {error.strerror or error}") from error
        except SafetensorError as error:
            raise DepgraphError(f"'{path}' is damaged: {error}; fetch it again") from error

    def names(self, file: str) -> list[str]:
        """The tensors of one shard."""
        return [name for name, stored in self.tensors.items() if stored.file == file]

    def num_bytes(self, *files: str) -> int:
        """Bytes of all tensors of these shards."""
        return sum(stored.num_bytes for stored in self.tensors.values() if stored.file in files)

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """A tensor in pieces along its first dimension, with the index each begins at.

        The shard is mapped anew for each piece: what is mapped counts as memory of the process.
        """
        stored = self.tensors[name]
        if not stored.shape:
            with self._open(stored.file) as shard:
                yield 0, shard.get_tensor(name).clone()
            return
        rows = max(1, PIECE_BYTES // max(1, stored.row_bytes))
        for start in range(0, stored.shape[0], rows):
            with self._open(stored.file) as shard:
                piece = shard.get_slice(name)[start : start + rows].clone()
            yield start, piece

    def identity(self) -> list[Any]:
        """Plain data that changes when a shard does."""
        stats = {file: (self.directory / file).stat() for file in self.files}
        return [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()]


def weight_files(directory: Path) -> tuple[str, ...]:
    """Names of a checkpoint's shards, or of its one file.

    Raises
    ------
    DepgraphError
        When there is none, or the index is damaged.
    """
    if (directory / INDEX).exists():
        return shards_of(directory)
    if (directory / WEIGHTS).exists():
        return (WEIGHTS,)
    raise DepgraphError(f"'{directory}' holds no weights: neither {INDEX} nor {WEIGHTS} is there")


def shards_of(directory: Path) -> tuple[str, ...]:
    """Names of the shards in a directory's index, in order; none where there is no index.

    Raises
    ------
    DepgraphError
        When the index is damaged, or names a file outside the directory.
    """
    index = directory / INDEX
    if not index.exists():
        return ()
    names = read_json(directory, INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise DepgraphError(f"'{index}' is no index of shards: no weight_map; fetch it again")
    for name in names.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise DepgraphError(
                f"'{index}' names a shard {str(name)[:80]!r}, which is no safetensors file in the "
                "same folder; fetch it again"
            )
    return tuple(sorted(set(names.values())))


def write_shard(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    pieces: Callable[[str], Iterable[Tensor]],
) -> None:
    """Write a safetensors file of which only a piece is ever in memory.

    Parameters
    ----------
    path : Path
        Written whole or not at all.
    tensors : mapping of str to (shape, dtype)
    pieces : callable
        Consecutive pieces of the tensor of a name, along its first dimension.

    Raises
    ------
    OSError
        When it cannot be written.
    ValueError
        When the pieces do not add up to the shape.
    """
    # Wide elements first, so that each tensor begins at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        shape, dtype = tensors[name]
        start, end = end, end + prod(shape) * dtype.itemsize
        offsets = {"shape": list(shape), "data_offsets": [start, end]}
        header[name] = {"dtype": _NAMES[dtype], **offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for piece in pieces(name):
                file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if file.tell() != 8 + len(text) + header[name]["data_offsets"][1]:
                raise ValueError(f"the pieces of '{name}' do not add up to {tensors[name]}")
        file.flush()
        os.fsync(file.fileno())


def index_text(files: Mapping[str, str], total_bytes: int) -> str:
    """What the index of shards holds, as transformers and `Checkpoint` read it."""
    data = {"metadata": {"total_size": total_bytes}, "weight_map": dict(files)}
    return json.dumps(data, indent=1)
