"""MODEL on the command line: a timm name, ``hf-hub:...``, or a directory that this tool saved."""

from __future__ import annotations

import difflib
import logging
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
from cli.options.failures import FAILURES
from cli.running.saved import load_saved
from depgraph import DepgraphError
from depgraph.storing.hub import is_hub_name, is_saved
from domains.training.checkpoint import UNREADABLE


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
    if (name and Path(name).is_dir()) or (is_hub_name(name) and is_saved(name)):
        given = {"--weights": weights, "--img-size": img_size, "--model-arg": model_args}
        said = next((option for option, value in given.items() if value), None)
        if said is not None:
            raise DepgraphError(f"'{name}' is a saved model, complete as it is; leave {said} out")
        return load_saved(Path(name), num_classes=num_classes, seed=seed)
    download = pretrained and weights is None and not structure_only
    arguments = constructor_arguments(img_size, num_classes, model_args)
    torch.manual_seed(seed)
    with torch.device("meta") if structure_only else nullcontext():
        model = create_model(name, arguments, download)
    note_source(model, name, arguments)
    if weights is not None and not structure_only:
        load_weights(model, weights)
    return model.eval()


def check_classes(model: nn.Module, classes: int, where: Path) -> None:
    """Refuse a model whose outputs are not the classes of the data, before any work.

    Raises
    ------
    DepgraphError
        When timm's ``num_classes`` of the model is another number.
    """
    outputs = getattr(model, "num_classes", classes)
    if outputs != classes:
        raise DepgraphError(
            f"the model has {outputs} outputs, but '{where}' has {classes} classes; make it with "
            f"--num-classes {classes}"
        )


def check_name(name: str, download: bool) -> None:
    """Refuse a name that timm does not have, with near ones."""
    if ":" in name:
        return  # a hub's name; only the hub knows
    base, dot, tag = name.partition(".")
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() has them all"
        raise DepgraphError(f"there is no model '{name}'{hint}")
    tagged = timm.list_models(f"{base}.*", pretrained=True)
    if dot and name not in tagged:
        hint = f"; it has {', '.join(tagged)}" if tagged else ""
        raise DepgraphError(f"timm has no weights '{tag}' for '{base}'{hint}")
    if download and not tagged and not timm.is_model_pretrained(name):
        raise DepgraphError(
            f"timm has no pretrained weights for '{name}'; give a checkpoint with --weights, or "
            "start at random with --no-pretrained"
        )


def constructor_arguments(
    img_size: int | None, num_classes: int | None, model_args: dict[str, Any] | None
) -> dict[str, Any]:
    """What timm's constructor gets, of what was said."""
    said = {"img_size": img_size, "num_classes": num_classes}
    return {**(model_args or {}), **{k: value for k, value in said.items() if value is not None}}


def create_model(name: str, arguments: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """A timm model as its constructor leaves it.

    Raises
    ------
    DepgraphError
        For a name that timm does not know, arguments its constructor refuses, and pretrained
        weights that cannot be had.
    """
    check_name(name, pretrained)
    # The hub's client tells of each of its retries; what came of them is told below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except OSError as error:  # the hub's own errors among them
        raise DepgraphError(
            f"'{name}' could not be had from the Hugging Face hub ({type(error).__name__}); give "
            "a timm name with --weights FILE, or with --no-pretrained"
        ) from error
    except FAILURES as error:
        text = str(error).partition("\n")[0]
        if not text or isinstance(error, LookupError):  # whose text is the key alone
            text = f"{type(error).__name__} {text}".rstrip()
        raise DepgraphError(f"timm cannot make '{name}' with {arguments}: {text}") from error


def note_source(model: nn.Module, name: str, arguments: dict[str, Any]) -> None:
    """Note down how a timm model was made; of one from the hub its own configuration says it."""
    if ":" not in name:
        depgraph.set_source(model, ("timm", name, arguments))


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
    state = _renamed(_read(path), model, path)
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
        state = load_state_dict(str(path), weights_only=True)
        if not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise TypeError("not only tensors")
    except (SafetensorError, *UNREADABLE) as error:
        raise DepgraphError(
            f"'{path}' cannot be read as weights ({type(error).__name__}); give safetensors, or a "
            "torch file of plain tensors"
        ) from error
    return state


def _renamed(state: dict[str, Tensor], model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The checkpoint in timm's names, position embeddings resampled: timm's own filter does it."""
    filters = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if filters is None:
        return state
    try:
        return filters(state, model)
    except (KeyError, IndexError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        text = str(error).partition("\n")[0]
        raise DepgraphError(
            f"'{path}' does not fit a {type(model).__name__}: timm cannot convert it "
            f"({type(error).__name__}: {text}); check the model name"
        ) from error


def example_inputs(model: nn.Module, img_size: int | None = None) -> Tensor:
    """One image's worth of zeros in the size the model takes, on its device."""
    from domains import image_size

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.zeros(1, 3, *image_size(model, img_size), device=device)
