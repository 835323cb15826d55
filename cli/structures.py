"""A model without its weights, for checkpoints that are larger than memory."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

import depgraph
from cli.failures import FAILURES
from cli.models import constructor_arguments, create_model, example_inputs, note_source
from cli.saved import is_saved_model, read_record
from depgraph import DepgraphError
from depgraph._files import read_json
from depgraph._recipe import check_arguments, check_config, transformers_class

TOKENS = 128
"""Length of the text that a language model's multiply-accumulates are counted for."""


def load_structure(
    checkpoint: Path,
    name: str | None,
    *,
    img_size: int | None = None,
    num_classes: int | None = None,
    model_args: dict[str, Any] | None = None,
) -> tuple[nn.Module, Tensor]:
    """Make the model that a checkpoint is of, parameters on the meta device and buffers real.

    Parameters
    ----------
    checkpoint : Path
        A directory. Unless there is a name, it has to say what it is of: ``plan.json`` of this
        tool, or ``config.json`` in the form of timm or of transformers.
    name : str, optional
        Of a timm model.
    img_size, num_classes : int, optional
    model_args : dict, optional
        As in `load_model`.

    Returns
    -------
    model : nn.Module
        In eval mode.
    inputs : Tensor
        One image, or `TOKENS` tokens.

    Raises
    ------
    DepgraphError
        When it cannot be told what the checkpoint is of, or the model cannot be made.
    """
    arguments = constructor_arguments(img_size, num_classes, model_args)
    config = _config(checkpoint)
    if name is None and is_saved_model(checkpoint):
        if num_classes is not None or model_args:
            raise DepgraphError(
                f"'{checkpoint}' is a saved model, complete as it is; leave --num-classes and "
                "--model-arg out"
            )
        model: nn.Module = depgraph.load_structure(checkpoint)
    elif name is None and "model_type" in config:
        return _transformers(checkpoint)
    else:
        if name is None:
            name = config.get("architecture")
            kept = {key: config[key] for key in ("num_classes",) if key in config}
            arguments = {**kept, **config.get("model_args", {}), **arguments}
        if name is None:
            raise DepgraphError(
                f"'{checkpoint}' does not say which model it is of: it has no plan.json and "
                "no config.json of timm or transformers; name the model before --checkpoint"
            )
        check_arguments(name, arguments)
        with init_empty_weights(include_buffers=False):
            model = create_model(name, arguments)
        note_source(model, name, arguments)
    return model.eval(), torch.zeros_like(example_inputs(model, img_size), device="cpu")


def _config(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "config.json"
    return read_record(path) if path.exists() else {}


def _transformers(checkpoint: Path) -> tuple[nn.Module, Tensor]:
    if not find_spec("transformers"):
        raise DepgraphError(f"'{checkpoint}' is of transformers; pip install transformers")
    said = read_json(checkpoint, "config.json")
    name = next(iter(said.get("architectures") or ()), None)
    if not isinstance(name, str):
        raise DepgraphError(
            f"'{checkpoint / 'config.json'}' names no class of transformers in 'architectures'"
        )
    made = transformers_class(name)
    try:
        config = made.config_class.from_dict(check_config(name, said))
    except FAILURES as error:
        raise DepgraphError(f"'{checkpoint / 'config.json'}' is no {name}'s: {error}") from error
    if getattr(config, "use_cache", False):
        # generated forwards refuse a cache, which the traced call did not pass
        config.use_cache = False
        click.echo("note: the pruned model runs without a cache of keys and values", err=True)
    with init_empty_weights(include_buffers=False):
        model = made(config)
    model.tie_weights()  # each became a meta tensor of its own
    if model.main_input_name == "input_ids":
        return model.eval(), torch.zeros(1, TOKENS, dtype=torch.long)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return model.eval(), torch.zeros(1, config.num_channels, height, width)
