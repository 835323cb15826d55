"""Training checkpoints: one file, whole or not there, read back without running any code of it.

They are `torch.save` archives read with `weights_only=True`, since optimiser states of any shape
must fit; models to keep are saved by `depgraph.save`.
"""

import hashlib
import os
import pickle
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depgraph import DepgraphError
from depgraph.files import replacing, temporary_prefix
from domains.data.folders import Sample
from domains.data.split import Split
from domains.recipe import FinetuneSettings

FILE_NAME = "checkpoint.pt"
UNREADABLE = (
    *(RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError),
    *(pickle.UnpicklingError, struct.error),
)
"""What `torch.load` raises for files that it did not write."""

_FREE = ("device", "num_workers", "cache_mib")  # settings that may change on a resume


def save_checkpoint(directory: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint under a temporary name, then rename: a reader never sees half of one.

    Raises
    ------
    DepgraphError
        The disk is full or read-only; the checkpoint before is untouched.
    """
    try:
        with replacing(directory / FILE_NAME) as part, part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a short write to the latter
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, KeyboardInterrupt):  # which its zip writer hides as well
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror
        raise DepgraphError(
            f"cannot write the checkpoint to {directory} ({reason}); free some space or choose "
            "another folder, then resume"
        ) from error


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint that a training of this package wrote."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, *UNREADABLE):
        return False
    return isinstance(state, dict) and {"identity", "state"} <= state.keys()


def prepare_directory(directory: Path) -> None:
    """Create the folder and write to it once, so that a bad one is found before training."""
    place = directory / FILE_NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        place.with_name(f"{temporary_prefix(place)}probe.tmp").write_bytes(b"")
        for left in directory.glob(f"{temporary_prefix(place)}*.tmp"):  # the probe, and what a
            left.unlink()  # run that was killed has left
    except OSError as error:
        raise DepgraphError(
            f"cannot write to {directory} ({error.strerror}); choose another folder"
        ) from error


def load_checkpoint(directory: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the state saved in `directory`, or None where there is none.

    Raises
    ------
    DepgraphError
        The file cannot be read, or belongs to other settings, data, model or teacher.
    """
    path = directory / FILE_NAME
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        saved = dict(state["identity"])
    except (OSError, *UNREADABLE) as error:
        raise DepgraphError(
            f"{path} is no readable checkpoint; delete it or train without resume"
        ) from error
    for key, now in identity.items():
        if saved.get(key) != now:
            raise DepgraphError(
                f"{path} was written with another {_difference(key, saved.get(key), now)}; resume "
                "with the same, or train without resume"
            )
    return state


def run_identity(
    model: nn.Module,
    split: Split,
    settings: FinetuneSettings,
    teacher: nn.Module | None,
    hooks: str | None,
) -> dict[str, Any]:
    """Return what must be the same for a resumed run to give the same result."""
    kept = {key: value for key, value in asdict(settings).items() if key not in _FREE}
    shapes = [(name, list(tensor.shape)) for name, tensor in model.state_dict().items()]
    sides = [_names(split.train), _names(split.val)]
    return {
        "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()},
        "data split": hashlib.sha256(repr((split.classes, sides)).encode()).hexdigest(),
        "model": hashlib.sha256(repr(shapes).encode()).hexdigest(),
        "hooks": hooks,
        "teacher": None if teacher is None else _weights_digest(teacher),
    }


def _names(side: Mapping[str, Sequence[Sample]]) -> list[tuple[str, str, int]]:
    return [(name, sample.path.name, sample.label) for name in side for sample in side[name]]


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _difference(key: str, saved: Any, now: Any) -> str:
    if key != "settings" or not isinstance(saved, dict):
        return key
    changed = [name for name in now if saved.get(name) != now[name]]
    return ", ".join(f"{name} ({saved.get(name)!r}, now {now[name]!r})" for name in changed)
