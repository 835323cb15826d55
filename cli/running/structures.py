"""A model without its weights, for checkpoints that are larger than memory."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import timm
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

import depgraph
from cli.options.failures import FAILURES
from cli.running.models import constructor_arguments, create_model, example_inputs, note_source
from cli.running.saved import is_saved_model, read_record
from depgraph import DepgraphError
from depgraph.storing.bounded import bounded
from depgraph.storing.checkpoint import Checkpoint
from depgraph.storing.reading import read_json
from depgraph.storing.recipe import Recipe, build, check_arguments, check_config, transformers_class

_MAX_BUFFER_BYTES = 8 << 30
"""Tables of positions and masks that are made in memory."""

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
        named = name is not None
        if name is None:
            name = _named(config)
            kept = {key: config[key] for key in ("num_classes",) if key in config}
            arguments = {**kept, **config.get("model_args", {}), **arguments}
        if name is None:
            raise DepgraphError(
                f"'{checkpoint}' does not say which model it is of: it has no plan.json and "
                "no config.json of timm or transformers; name the model before --checkpoint"
            )
        check_arguments(name, arguments)
        if not named:
            _check_buffers({"library": "timm", "name": name, "arguments": arguments}, checkpoint)
        with init_empty_weights(include_buffers=False):
            model = bounded(lambda: create_model(str(name), arguments))
        note_source(model, name, arguments)
    return model.eval(), torch.zeros_like(example_inputs(model, img_size), device="cpu")


def _config(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "config.json"
    return read_record(path) if path.exists() else {}


def _named(config: dict[str, Any]) -> str | None:
    """The model of timm that a checkpoint is of; by a name of timm's own, which names no place."""
    name = config.get("architecture")
    return name if isinstance(name, str) and timm.is_model(name.partition(".")[0]) else None


def _check_buffers(recipe: Recipe, checkpoint: Path) -> None:
    """Refuse a configuration that asks for more than a model of the tensors in the checkpoint."""
    limit = 20_000 + 50 * len(Checkpoint(checkpoint).tensors)
    model = bounded(lambda: build(recipe, limit))
    size = sum(buffer.nbytes for buffer in model.buffers())
    if size > _MAX_BUFFER_BYTES:
        raise DepgraphError(
            f"'{checkpoint / 'config.json'}' asks for {size:,} bytes of buffers, which are no "
            "weights; check its sizes"
        )


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
        arguments = check_config(name, said)
        _check_buffers(
            {"library": "transformers", "name": name, "arguments": arguments}, checkpoint
        )
        config = made.config_class.from_dict(arguments)
    except FAILURES as error:
        raise DepgraphError(f"'{checkpoint / 'config.json'}' is no {name}'s: {error}") from error
    if getattr(config, "use_cache", False):
        # generated forwards refuse a cache, which the traced call did not pass
        config.use_cache = False
        click.echo("note: the pruned model runs without a cache of keys and values", err=True)
    with init_empty_weights(include_buffers=False):
        model = bounded(lambda: made(config))
    model.tie_weights()  # each became a meta tensor of its own
    if model.main_input_name == "input_ids":
        return model.eval(), torch.zeros(1, TOKENS, dtype=torch.long)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return model.eval(), torch.zeros(1, config.num_channels, height, width)
