"""MODEL on the command line: a timm name, ``hf-hub:...``, or a directory that this tool saved."""

from __future__ import annotations

import difflib
import pickle
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import timm
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor, nn

import depgraph
from depgraph import DepgraphError


def load_model(
    name: str,
    *,
    pretrained: bool = True,
    weights: Path | None = None,
    img_size: int | None = None,
    num_classes: int | None = None,
    model_args: dict[str, Any] | None = None,
    seed: int = 0,
    structure_only: bool = False,
) -> nn.Module:
    """Make the model that the command line names.

    Parameters
    ----------
    name : str
        A timm name, ``hf-hub:...``, or a directory.
    pretrained : bool
        Load timm's weights where no file is given.
    weights : Path, optional
        Checkpoint file.
    img_size, num_classes : int, optional
        As in timm.
    model_args : dict, optional
        More arguments of the constructor.
    seed : int
        For what starts at random: all of it, or a new head.
    structure_only : bool
        Make it on the meta device, without any weights.

    Returns
    -------
    nn.Module
        In eval mode, on the CPU (or meta).

    Raises
    ------
    DepgraphError
        For a name that timm does not know, arguments its constructor refuses, and weights that
        cannot be had or do not fit.
    """
    if saved_in(Path(name)) is not None:
        return depgraph.load(saved_in(Path(name)) or name).eval()
    if Path(name).is_dir():
        raise DepgraphError(f"'{name}' is a directory without a saved model (no structure.json)")
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() has them all"
        raise DepgraphError(f"there is no model '{name}'{hint}")
    arguments = dict(model_args or {})
    arguments |= {} if img_size is None else {"img_size": img_size}
    arguments |= {} if num_classes is None else {"num_classes": num_classes}
    torch.manual_seed(seed)
    download = pretrained and weights is None and not structure_only
    with torch.device("meta") if structure_only else nullcontext():
        model = _create(name, download, arguments)
    if weights is not None and not structure_only:
        load_weights(model, weights)
    return model.eval()


def saved_in(directory: Path) -> Path | None:
    """Where the saved model is: the directory itself, or ``pruned`` of a run's directory."""
    for place in (directory, directory / "pruned"):
        if (place / "structure.json").exists():
            return place
    return None


def dense_of(directory: Path) -> Path | None:
    """The dense model that a run left beside its pruned one, if any."""
    place = saved_in(directory)
    dense = None if place is None else place.parent / "dense"
    return dense if dense is not None and (dense / "structure.json").exists() else None


def _create(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        text = str(error).partition("\n")[0] or type(error).__name__
        raise DepgraphError(f"timm cannot make '{name}' with {arguments}: {text}") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise DepgraphError(
            f"the pretrained weights of '{name}' could not be had ({type(error).__name__}); give "
            "a checkpoint with --weights, or start at random with --no-pretrained"
        ) from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint into a timm model; a head that does not fit starts anew, and says so.

    Parameters
    ----------
    model : nn.Module
    path : Path
        Safetensors, or a torch file that holds plain tensors only.

    Raises
    ------
    DepgraphError
        When the file cannot be read, or does not fit: the first parameter that does not is named.
    """
    state = _read(path)
    filters = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if filters is not None:
        state = filters(state, model)  # timm's own: renames, and resamples position embeddings
    own = model.state_dict()
    head = tuple(f"{name}." for name in _classifier_names(model))
    fresh = [n for n in own if n.startswith(head) and not _fits(state.get(n), own[n])]
    for name in [n for n in state if n.startswith(head) and not _fits(state[n], own.get(n))]:
        del state[name]
    for name, tensor in own.items():
        if name in fresh:
            continue
        if name not in state:
            raise DepgraphError(f"'{path}' does not fit: it has no '{name}'")
        if not _fits(state[name], tensor):
            raise DepgraphError(
                f"'{path}' does not fit: '{name}' has shape {tuple(state[name].shape)}, the model "
                f"needs {tuple(tensor.shape)}; check the model name, --img-size and --model-arg"
            )
    extra = next((name for name in state if name not in own), None)
    if extra is not None:
        raise DepgraphError(f"'{path}' does not fit: the model has no '{extra}'")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    if fresh:
        click.echo(f"note: {', '.join(fresh)} not in '{path.name}'; they start at random", err=True)


def _fits(tensor: Tensor | None, own: Tensor | None) -> bool:
    return tensor is not None and own is not None and tensor.shape == own.shape


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DepgraphError(f"there is no file '{path}'")
    try:
        return load_state_dict(str(path), weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise DepgraphError(
            f"'{path}' cannot be read as weights ({type(error).__name__}); give safetensors, or a "
            "torch file of plain tensors"
        ) from error


def example_inputs(model: nn.Module, img_size: int | None = None) -> Tensor:
    """One image's worth of zeros in the size the model takes, on its device."""
    from domains import image_size

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.zeros(1, 3, *image_size(model, img_size), device=device)
