"""Where a saved model is put: whole or not at all, in the place of an earlier one of ours."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from depgraph.errors import DepgraphError
from depgraph.storing.checkpoint import INDEX, WEIGHTS
from depgraph.storing.manifest import BEFORE, NAME
from depgraph.storing.reading import read_json

BUFFERS = "buffers.safetensors"


class FolderBeside:
    """A new folder next to where it shall be; gone at the end."""

    def __init__(self, directory: Path) -> None:
        self.path = directory.parent / f".{directory.name}.{secrets.token_hex(6)}"

    def __enter__(self) -> Path:
        self.path.mkdir(parents=True)
        return self.path

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def check_place(directory: Path) -> None:
    """Refuse to save where something is that this tool did not write.

    Raises
    ------
    DepgraphError
    """
    ours = (directory / BEFORE).exists() or _says_ours(directory / "config.json")
    if not ours and any((directory / name).exists() for name in (INDEX, WEIGHTS, NAME)):
        raise DepgraphError(
            f"'{directory}' holds a checkpoint that this tool did not write; choose another "
            "directory"
        )


def _says_ours(path: Path) -> bool:
    """Whether a configuration is one that this tool wrote."""
    try:
        return "depgraph_format" in read_json(path.parent, path.name)
    except DepgraphError:
        return False


def move_files(temporary: Path, directory: Path) -> None:
    """Put a whole saved model in the place of an earlier one; ``plan.json`` comes last."""
    if not directory.exists():
        os.replace(temporary, directory)
        temporary.mkdir()  # whoever made it removes it
        return
    stale = _earlier(directory) - {path.name for path in temporary.iterdir()}
    for path in sorted(temporary.iterdir(), key=lambda path: (path.name == NAME, path.name)):
        os.replace(path, directory / path.name)
    for name in stale:
        (directory / name).unlink(missing_ok=True)


def _earlier(directory: Path) -> set[str]:
    """Files that an earlier saved model left in a directory, by the names that this tool gives."""
    patterns = (NAME, BEFORE, "plan.[0-9].json", "plan.[0-9][0-9].json", BUFFERS, WEIGHTS, INDEX)
    shards = "model-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors"
    return {path.name for pattern in (*patterns, shards) for path in directory.glob(pattern)}


def flat(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: contiguous, none a part of another's memory."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        whole = tensor.is_contiguous() and storage not in seen
        seen.add(storage)
        out[name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
    return out
