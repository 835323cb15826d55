"""The options of `run` that decide what it does: a sweep's file may name each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cli.options.params import Number
from cli.options.shared import (
    batch_size_option,
    compute_options,
    data_option,
    model_options,
    pruning_options,
    recipe_option,
    schedule_options,
    seconds_option,
    seed_option,
    split_option,
    target_option,
    training_options,
)

_OPTIONS = (
    model_options,
    data_option,
    target_option,
    split_option,
    pruning_options,
    training_options,
    click.option(
        "--dense-epochs",
        type=click.IntRange(0),
        help="Epochs before pruning  [6].",
    ),
    click.option("--dense-lr", type=Number(0, min_open=True), help="Learning rate before pruning."),
    click.option(
        "--dense",
        type=click.Path(path_type=Path),
        help="Dense model, fine-tuned earlier.",
    ),
    recipe_option,
    schedule_options,
    click.option(
        "--distill/--no-distill", default=None, help="Distil from the dense model  [by recipe]."
    ),
    batch_size_option(1, "--bench-batch-size", "Batch size of the timing."),
    seconds_option(10.0),
    seed_option,
    compute_options,
)


def options_of_run(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command with them, in this order."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function
