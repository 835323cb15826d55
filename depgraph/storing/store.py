"""Saves a model, pruned or not, as a folder of JSON and safetensors, and loads it bit for bit.

A folder holds a recipe, plans and weights: ``plan.json`` says how the dense model is made and what
was removed of it, ``model.safetensors`` has the parameters and persistent buffers (or shards of it,
with ``model.safetensors.index.json``), ``buffers.safetensors`` the other tensors, where there are
any, and ``config.json`` the model's name and data configuration in timm's form. No object, no class
and no program is read from it: the model is made by the constructor of the library it is from, or
given by the user, and the plans are applied again.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from depgraph.errors import DepgraphError
from depgraph.files import set_modes as set_file_modes
from depgraph.storing.bounded import bounded
from depgraph.storing.checkpoint import WEIGHTS, Checkpoint, weight_files
from depgraph.storing.describe import Saved, describe, plans_of
from depgraph.storing.folder import BUFFERS, FolderBeside, check_place, flat, move_files
from depgraph.storing.hub import fetch, is_hub_name
from depgraph.storing.manifest import FORMAT, NAME, Manifest, read_manifest
from depgraph.storing.outline import facts, first_difference, ops
from depgraph.storing.reading import checksum, inside
from depgraph.storing.replay import place, rebuild
from depgraph.tracing.modules import structural_copy
from depgraph.tracing.placing import held, registered, without_data

_remembered: dict[str, nn.Module] = {}
"""Structures, without data, of the models that this process saved and no recipe makes."""


def save(model: nn.Module, directory: str | PathLike[str], source: Any = None) -> None:
    """Save a model so that `load` gives it back bit for bit.

    Parameters
    ----------
    model : nn.Module
        Pruned by plans, or not.
    directory : path
        Made if it does not exist; other files in it are left alone.
    source : tuple or mapping, optional
        How the dense model is made: ``("timm", name, arguments)`` or ``("torchvision", name,
        arguments)``, arguments a dict of plain values and optional, or ``("transformers", class
        name, configuration)``. By default it is found, for models of these libraries, where what
        the model says of itself suffices.

    Raises
    ------
    DepgraphError
        When the source does not make the model, something of it cannot come back, the files cannot
        be written, or the directory holds another program's checkpoint. What was there before is
        kept then.

    Notes
    -----
    Before anything is put in place the model is made again, and compared: names, shapes, ties,
    classes, hooks and attributes; with a plan also every op of a trace; and each tensor that was
    written, by its bytes. A model that no source makes is saved all the same: `load` takes an
    instance of it then, as it was before it was pruned, and compares that; the process that saved
    it needs none.
    """
    directory = Path(directory)
    check_place(directory)
    saved = describe(model, source)
    meta = next((name for name, tensor in saved.weights.items() if tensor.is_meta), None)
    if meta is not None:
        raise DepgraphError(f"'{meta}' is on the meta device; a model without weights has none")
    try:
        with FolderBeside(directory) as temporary:
            save_file(flat(saved.weights), temporary / WEIGHTS, metadata={"format": "pt"})
            _prove(temporary, write_texts(temporary, saved), saved)
            move_files(temporary, directory)
    except OSError as error:
        raise DepgraphError(
            f"cannot save to '{directory}': {error.strerror or error}; choose another directory"
        ) from error
    except SafetensorError as error:
        raise DepgraphError(
            f"cannot save to '{directory}': {error}; choose another directory"
        ) from error
    remember(saved.manifest, model)


def write_texts(directory: Path, saved: Saved) -> Manifest:
    """Write what a saved model has beside its weights; all files get the modes that umask gives.

    Parameters
    ----------
    directory : Path
        Where the weights are already.
    saved : Saved

    Returns
    -------
    Manifest
        With the checksums of all tensors.
    """
    if saved.others:
        save_file(flat(saved.others), directory / BUFFERS)
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    checksums = {name: checksum(directory, name) for name in files}
    manifest = dataclasses.replace(saved.manifest, checksums=checksums)
    texts = {NAME: manifest.to_json(), "config.json": json.dumps(saved.config, indent=1)}
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    set_file_modes(directory)
    return manifest


def _prove(directory: Path, manifest: Manifest, saved: Saved) -> None:
    """Read what was written, and compare."""
    if read_manifest(directory) != manifest:
        raise DepgraphError("plan.json does not come back as it was written; nothing was saved")
    written = _read_tensors(directory, WEIGHTS, "cpu")
    if saved.others:
        written |= _read_tensors(directory, BUFFERS, "cpu")
    for name, tensor in {**saved.weights, **saved.others}.items():
        if not _same_bytes(tensor, written[name]):
            raise DepgraphError(f"'{name}' does not come back as it was written; nothing was saved")


def _same_bytes(tensor: Tensor, other: Tensor) -> bool:
    if tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    first, second = (x.detach().cpu().reshape(-1).view(torch.uint8) for x in (tensor, other))
    return torch.equal(first, second)


def remember(manifest: Manifest, model: nn.Module) -> None:
    """Keep the structure of a model that no recipe makes, for the rest of this process."""
    if manifest.recipe is None:
        try:
            _remembered[manifest.key] = copy.deepcopy(without_data(model))
        except (TypeError, RuntimeError, AttributeError, copy.Error, DepgraphError):
            return  # an open file, a lock: load asks for the model


def load(
    directory: str | PathLike[str],
    device: str | torch.device = "cpu",
    model: nn.Module | None = None,
) -> nn.Module:
    """A model that `save` wrote.

    Parameters
    ----------
    directory : path
        Or ``"hf-hub:owner/name"``, for one on the Hugging Face hub.
    device : str or torch.device
        Where its tensors go.
    model : nn.Module, optional
        The model as it was before it was pruned, where the folder does not say how it is made; its
        weights do not matter. It stays as it is.

    Returns
    -------
    nn.Module
        In the mode in which it was saved, with the same parameters and buffers.

    Raises
    ------
    DepgraphError
        When a file is missing or damaged, the model is made by a package that is not there or by
        the user's own code, the given model does not become the one that was saved, or it takes
        more work to make than a model needs.

    Notes
    -----
    What a folder may cost is bounded: the size of its texts, each number, the parts that a
    constructor registers (by the parameters that the plans name), the elements of example inputs,
    and for making the model and applying the plans again, five minutes of the thread's CPU time and
    8 GiB of memory.
    """
    directory = fetch(str(directory)) if is_hub_name(directory) else Path(directory)
    manifest, built = _structure(directory, model)
    tensors: dict[str, Tensor] = {}
    for file in weight_files(directory):
        tensors |= _read_tensors(directory, file, device, manifest)
    return _filled(directory, manifest, built, tensors, device, model is not None)


def load_structure(directory: str | PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """A model that `save` wrote, without its weights.

    Parameters
    ----------
    directory : path
    model : nn.Module, optional
        See `load`.

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
    manifest, built = _structure(directory, model)
    stored = Checkpoint(directory).tensors.items()
    tensors = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in stored}
    return _filled(directory, manifest, built, tensors, "cpu", model is not None)


def _structure(directory: Path, model: nn.Module | None) -> tuple[Manifest, nn.Module]:
    """What a folder says, and the model that it leads to, without data."""
    manifest = read_manifest(directory)
    if model is None and manifest.recipe is None and manifest.key in _remembered:
        return manifest, structural_copy(_remembered[manifest.key])
    try:
        return manifest, bounded(lambda: rebuild(manifest, model))
    except DepgraphError as error:
        raise DepgraphError(f"'{directory}': {error}") from error
    except Exception as error:  # whatever odd plans lead to
        text = f"{type(error).__name__}: {str(error)[:200]}"
        raise DepgraphError(f"'{directory}' leads to no model ({text}); save it again") from error


def _filled(
    directory: Path,
    manifest: Manifest,
    built: nn.Module,
    tensors: dict[str, Tensor],
    device: str | torch.device,
    given: bool,
) -> nn.Module:
    weights = set(tensors)
    if (directory / BUFFERS).exists():
        tensors |= _read_tensors(directory, BUFFERS, device, manifest)
    place(manifest, built, tensors)
    for name, tensor in {**registered(built), **held(built)}.items():
        if tensor.is_meta and not (name in weights and tensors[name].is_meta):
            raise DepgraphError(f"'{directory}' has no values for '{name}'; save the model again")
    if given:
        _compare(manifest, built)
    return built


def _compare(manifest: Manifest, built: nn.Module) -> None:
    """Refuse a given model that did not become the one that was saved."""
    odd, caches = None, frozenset()  # type: ignore[var-annotated]
    if manifest.ops and manifest.plans:
        found, caches = bounded(lambda: ops(built, manifest.plans[-1]))
        odd = first_difference(manifest.ops, found)
    if odd is None and manifest.facts:
        odd = first_difference(manifest.facts, facts(built, caches))
    if odd is not None:
        raise DepgraphError(
            f"the given model does not become the one that was saved: {odd[:200]} differs; make it "
            "as it was made then, or save it again"
        )


def _read_tensors(
    directory: Path, file: str, device: str | torch.device, manifest: Manifest | None = None
) -> dict[str, Tensor]:
    """The tensors of a file; of one that is not as it was written none, where a manifest tells."""
    path = inside(directory, file)
    if manifest is not None and manifest.checksums.get(file) != checksum(directory, file):
        raise DepgraphError(
            f"'{path}' is damaged: it is not the file that was saved with {NAME}; save the model "
            "again, or copy both files again"
        )
    try:
        found = load_file(path, device=str(device))
        # torch's kernels give other last digits where memory begins at odd places
        return {name: t.clone() if t.data_ptr() % 64 else t for name, t in found.items()}
    except OSError as error:
        raise DepgraphError(f"cannot read '{path}': {error.strerror or error}") from error
    except (SafetensorError, ValueError, RuntimeError) as error:
        text = str(error).partition("\n")[0][:200]
        raise DepgraphError(f"'{path}' is damaged: {text}; save the model again") from error


__all__ = ["FORMAT", "load", "load_structure", "plans_of", "save"]
