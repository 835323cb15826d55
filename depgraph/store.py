"""Saves a model, pruned or not, as a directory of JSON and safetensors, and loads it bit for bit.

A directory holds ``model.safetensors`` (parameters and persistent buffers; or shards of it, with
``model.safetensors.index.json``), ``buffers.safetensors`` (the other buffers, where there are any),
``structure.json`` (the module tree), ``plan.json`` (what was removed, where something was;
``plan.<i>.json`` for earlier prunings) and ``config.json`` (the model's name and data configuration
in timm's form).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from depgraph._structure import Decoder, Encoder
from depgraph.checkpoint import INDEX, WEIGHTS, Checkpoint, shards_of, weight_files
from depgraph.errors import DepgraphError
from depgraph.files import set_modes
from depgraph.hub import fetch, is_hub_name
from depgraph.plan import Plan

FORMAT = 1
"""Version of the directory's layout."""

_BUFFERS, _STRUCTURE = "buffers.safetensors", "structure.json"


def save(model: nn.Module, directory: str | PathLike[str]) -> None:
    """Save a model so that `load` gives it back bit for bit.

    Parameters
    ----------
    model : nn.Module
        Pruned by a plan, or not.
    directory : path
        Made if it does not exist; other files in it are left alone.

    Raises
    ------
    DepgraphError
        When an attribute cannot be saved as plain data, the files cannot be written, or the
        directory holds another program's checkpoint. What was there before is kept then.

    Notes
    -----
    The structure is recorded as it is, instead of the name and arguments that once built the model:
    it also holds what was changed since (a new head, a replaced layer), and loading needs no trace.
    """
    directory = Path(directory)
    check_place(directory)
    encoder = Encoder()
    texts = describe(model, encoder)
    try:
        _write(directory, texts, encoder)
    except OSError as error:
        raise DepgraphError(
            f"cannot save to '{directory}': {error.strerror or error}; choose another directory"
        ) from error
    except SafetensorError as error:
        raise DepgraphError(
            f"cannot save to '{directory}': {error}; choose another directory"
        ) from error


def describe(model: nn.Module, encoder: Encoder) -> dict[str, str]:
    """The text files of a saved model, by name; its tensors are in the encoder afterwards."""
    structure = {
        "format": FORMAT,
        "torch": torch.__version__,
        "model": encoder.module(model),
    }
    texts = {_STRUCTURE: json.dumps(structure), "config.json": json.dumps(_config(model), indent=1)}
    plans = plans_of(model)
    for i, plan in enumerate(plans[:-1]):
        texts[f"plan.{i}.json"] = plan.to_json()
    if plans:
        texts["plan.json"] = plans[-1].to_json()
    return texts


def _write(directory: Path, texts: dict[str, str], encoder: Encoder) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        save_file(_flat(encoder.persistent), temporary / WEIGHTS, metadata={"format": "pt"})
        write_texts(temporary, texts, encoder)
        move_files(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_texts(directory: Path, texts: Mapping[str, str], encoder: Encoder) -> None:
    """Write what a saved model has beside its weights."""
    if encoder.transient:
        save_file(_flat(encoder.transient), directory / _BUFFERS)
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")


def check_place(directory: Path) -> None:
    """Refuse to save where another program's checkpoint in shards is.

    Raises
    ------
    DepgraphError
    """
    if (directory / INDEX).exists() and not (directory / _STRUCTURE).exists():
        raise DepgraphError(
            f"'{directory}' holds a checkpoint that this tool did not write; choose another "
            "directory"
        )


def move_files(temporary: Path, directory: Path) -> None:
    """Put a whole saved model in the place of an earlier one."""
    directory.mkdir(parents=True, exist_ok=True)
    stale = _earlier(directory) - {path.name for path in temporary.iterdir()}
    set_modes(temporary)
    for path in sorted(temporary.iterdir()):
        os.replace(path, directory / path.name)
    for name in stale:
        (directory / name).unlink(missing_ok=True)


def _earlier(directory: Path) -> set[str]:
    """Files of the saved model in a directory that not every saved model has."""
    if not (directory / _STRUCTURE).exists():
        return set()
    plans = {path.name for path in directory.glob("plan.[0-9]*.json")}
    return {*plans, "plan.json", _BUFFERS, WEIGHTS, INDEX, *shards_of(directory)}


def _flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: contiguous, none a view into another's memory."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        whole = tensor.is_contiguous() and storage not in seen
        seen.add(storage)
        out[name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
    return out


def _config(model: nn.Module) -> dict[str, Any]:
    """What timm's hub form says of a model; little more than the class for others."""
    cfg = getattr(model, "pretrained_cfg", None)
    config: dict[str, Any] = {"architecture": type(model).__name__, "depgraph_format": FORMAT}
    if isinstance(cfg, dict):
        plain = {key: value for key, value in cfg.items() if _is_plain(value)}
        config["architecture"] = plain.get("architecture", config["architecture"])
        config["pretrained_cfg"] = plain
    for name in ("num_classes", "num_features"):
        value = getattr(model, name, None)
        if isinstance(value, int):
            config[name] = value
    return config


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def plans_of(model: nn.Module) -> tuple[Plan, ...]:
    """The plans that made a model what it is, earliest first; none for a dense model.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    tuple of Plan
    """
    return tuple(vars(model).get("depgraph_plans", ()))


def load(directory: str | PathLike[str], device: str | torch.device = "cpu") -> nn.Module:
    """A model that `save` wrote.

    Parameters
    ----------
    directory : path
        Or ``"hf-hub:owner/name"``, for one on the Hugging Face hub.
    device : str or torch.device
        Where its tensors go.

    Returns
    -------
    nn.Module
        In the mode in which it was saved, with the same parameters, buffers and attributes.

    Raises
    ------
    DepgraphError
        When a file is missing or damaged, or the model needs a package that is not there.
    """
    directory = fetch(str(directory)) if is_hub_name(directory) else Path(directory)
    structure = _read_structure(directory)
    tensors: dict[str, Tensor] = {}
    for file in weight_files(directory):
        tensors.update(_read_tensors(directory / file, device))
    return _built(directory, structure, tensors, device)


def load_structure(directory: str | PathLike[str]) -> nn.Module:
    """A model that `save` wrote, without its weights.

    Parameters
    ----------
    directory : path

    Returns
    -------
    nn.Module
        Parameters and persistent buffers on the meta device, other buffers as they were.

    Raises
    ------
    DepgraphError
        As `load`.
    """
    directory = Path(directory)
    structure = _read_structure(directory)
    stored = Checkpoint(directory).tensors.items()
    tensors = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in stored}
    return _built(directory, structure, tensors, "cpu")


def _read_structure(directory: Path) -> dict[str, Any]:
    structure = _read_json(directory / _STRUCTURE)
    if structure.get("format") != FORMAT:
        raise DepgraphError(
            f"'{directory}' has format {structure.get('format')!r}; this version reads {FORMAT}"
        )
    return structure


def _built(
    directory: Path,
    structure: dict[str, Any],
    tensors: dict[str, Tensor],
    device: str | torch.device,
) -> nn.Module:
    if (directory / _BUFFERS).exists():
        tensors.update(_read_tensors(directory / _BUFFERS, device))
    try:
        model = Decoder(tensors).module(structure["model"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DepgraphError):
            raise
        raise DepgraphError(f"'{directory / _STRUCTURE}' is damaged: {error!r}") from error
    plans = [*sorted(directory.glob("plan.[0-9]*.json")), directory / "plan.json"]
    found = [_read_plan(path) for path in plans if path.exists()]
    if found:
        model.depgraph_plans = found  # type: ignore[assignment]
    return model


def _read_plan(path: Path) -> Plan:
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of either of the two
        raise DepgraphError(f"'{path}' is damaged: {error}; save the model again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DepgraphError(
            f"'{path.parent}' is no saved model: {path.name}: {error.strerror}; "
            "save one with depgraph.save"
        ) from error
    except ValueError as error:
        raise DepgraphError(f"'{path}' is damaged: {error}; save the model again") from error
    if not isinstance(data, dict):
        raise DepgraphError(f"'{path}' is damaged: no JSON object; save the model again")
    return data


def _read_tensors(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    try:
        return load_file(path, device=str(device))
    except OSError as error:
        raise DepgraphError(f"cannot read '{path}': {error.strerror or error}") from error
    except SafetensorError as error:
        raise DepgraphError(f"'{path}' is damaged: {error}; save the model again") from error
