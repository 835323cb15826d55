"""Options that several commands share, as decorators: each is spelled and explained once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import domains
from cli.options.calibration import CALIBRATION, known_calibration
from cli.options.params import (
    Multiple,
    Number,
    Share,
    key_values,
    known_algorithm,
    known_metric,
    present_device,
    words,
)
from cli.options.said import BEST_METRIC
from cli.options.schedules import SCHEDULES, STEP_EPOCHS, STEPS
from cli.options.tracking import TRACKERS, available_tracker
from domains.data.looks import TO_TRAIN
from pruners import COMBINATIONS, METRICS, PRESETS
from pruners.choosing.allocation import PER, SCOPES
from pruners.choosing.choices import AUTO, NORMALISATIONS

Command = Callable[..., Any]


def _combined(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
seed_option = click.option(
    "--seed",
    type=click.IntRange(-(2**63), 2**63 - 1),  # what torch takes
    default=0,
    help="Seed of all random numbers  [0].",
)
data_option = click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder ROOT/<domain>/<class>/<image>.",
)
target_option = click.option("--target", required=True, help="Target domain, held out of training.")
split_option = click.option(
    "--split-by",
    type=click.Choice(["image", "stem"]),
    default="image",
    show_default=True,
    help="stem: images of the same file name, in any domain, go to the same part.",
)
out_option = click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Output directory.",
)
track_option = click.option(
    "--track",
    type=click.Choice(TRACKERS),
    callback=available_tracker,
    help="Also log each epoch to this tracker; its files go to tracking/ in the output directory.",
)
resume_option = click.option("--resume", is_flag=True, help="Continue an interrupted call.")

metric_option = click.option(
    "--metric",
    callback=known_metric,
    help=f"One of {', '.join(METRICS)}; by default {BEST_METRIC}, on kinds {AUTO}.",
)


recipe_option = click.option(
    "--recipe",
    type=click.Choice(list(domains.RECIPES)),
    help="How to train after pruning: "
    + "; ".join(f"{name} ({recipe.cost})" for name, recipe in domains.RECIPES.items())
    + "  [looks after a compensated cut, gentle where there is no dense model; else strong].",
)


def device_option(default: str | None = None) -> Callable[[Command], Command]:
    """``--device``; without a default, CUDA where there is one."""
    said = "" if default else "; by default CUDA where there is one"
    return click.option(
        "--device",
        default=default,
        show_default=default is not None,
        callback=present_device,
        help=f"cpu, cuda, cuda:1, ...{said}.",
    )


def seconds_option(default: float, name: str = "--bench-seconds") -> Callable[[Command], Command]:
    """How long to time for."""
    return click.option(
        name,
        type=Number(0),
        default=default,
        show_default=True,
        help="Seconds to time for, all models together.",
    )


def batch_size_option(
    default: int, name: str = "--batch-size", says: str = "Images at once."
) -> Callable[[Command], Command]:
    """Images of one forward pass."""
    return click.option(name, type=click.IntRange(1), default=default, show_default=True, help=says)


_model_details = (
    click.option("--pretrained/--no-pretrained", default=True, help="timm's weights, or random."),
    click.option(
        "--weights",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Checkpoint to start from: safetensors, or a torch file of plain tensors.",
    ),
    click.option("--img-size", type=click.IntRange(1), help="Side of the input images."),
    click.option("--num-classes", type=click.IntRange(0), help="Outputs of the classifier."),
    click.option(
        "--model-arg",
        "model_args",
        multiple=True,
        callback=key_values,
        metavar="KEY=VALUE",
        help="Argument of the model's constructor; may be given again.",
    ),
)
model_options = _combined(
    click.argument("model_name", metavar="MODEL"),
    *_model_details,
)

optional_model_options = _combined(
    click.argument("model_name", metavar="MODEL", required=False),
    *_model_details,
)

compute_options = _combined(
    device_option(),
    click.option("--amp/--no-amp", default=False, help="Mixed precision."),
)


def _preset(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Make a preset the default of the options that it speaks of."""
    said = dict(PRESETS[value]) if value is not None else {}
    by = said.get("compensate")
    if isinstance(by, str):
        said |= {"compensate": True, "compensate_by": by}
    if isinstance(said.get("kinds"), str):
        said["kinds"] = (said["kinds"],)
    ctx.default_map = {**(ctx.default_map or {}), **said}
    return value


pruning_options = _combined(
    click.option(
        "--preset",
        type=click.Choice(list(PRESETS)),
        is_eager=True,
        expose_value=False,
        callback=_preset,
        help="A method of others, to compare with: metric, kinds, scope and compensation, where "
        "they are not said.",
    ),
    click.option("--ratio", type=Share(), help="Share of the prunable units to remove."),
    click.option("--target-macs", type=Share(), help="Share of the MACs to keep."),
    click.option("--target-params", type=Share(), help="Share of the parameters to keep."),
    click.option(
        "--target-latency",
        type=Share(),
        help="Share of the latency to keep, as predicted from the device's latency table.",
    ),
    click.option(
        "--latency-table",
        type=click.Path(path_type=Path, dir_okay=False),
        help="File of the device's table; what it lacks is measured and added  [in the user's "
        "cache folder].",
    ),
    batch_size_option(1, "--latency-batch-size", "Batch size that the latency is predicted for."),
    metric_option,
    click.option("--scope", type=click.Choice(SCOPES), default="global", show_default=True),
    click.option(
        "--kinds",
        multiple=True,
        callback=words,
        help="Kinds of groups to prune, by comma: heads,head_dim,hidden,embed; all by default. "
        "auto: heads and embed only where the target cannot be reached without.",
    ),
    click.option(
        "--ignore",
        multiple=True,
        callback=words,
        help="Patterns of modules, parameters or groups to leave whole, by comma.",
    ),
    click.option(
        "--round-to",
        type=Multiple(),
        help="Keep multiples of this; auto: sizes that the device is fast at, by the latency table "
        " [1; with --target-latency: auto].",
    ),
    click.option(
        "--min-units",
        type=click.IntRange(0),
        default=1,
        show_default=True,
        help="Units that each group keeps at least; with 0, whole branches may be removed.",
    ),
    click.option(
        "--normalise",
        type=click.Choice(list(NORMALISATIONS)),
        help="What the scores of a group are divided by before all groups are ranked together  "
        "[mean; obs: none].",
    ),
    click.option(
        "--per",
        type=click.Choice(PER),
        help="Rank units by score, or by score per cost saved  [unit; obs: macs].",
    ),
    click.option(
        "--num-samples",
        type=click.IntRange(1),
        help="Samples to score with  [64; obs: 256; twice as many in styles].",
    ),
    click.option(
        "--across-domains",
        type=click.Choice(COMBINATIONS),
        help="Score each source domain separately; units that only some use count for less  "
        "[all domains together].",
    ),
    click.option(
        "--compensate/--no-compensate",
        default=None,
        help="Fit the remaining weights by least squares on images, without training  [where there "
        "are images].",
    ),
    click.option(
        "--compensate-by",
        type=click.Choice(["least-squares", "readers", "means"]),
        default="least-squares",
        show_default=True,
        help="readers: refit the layers that lost inputs alone. means: move their biases alone, so "
        "that the means of all outputs stay.",
    ),
    click.option(
        "--calibration",
        callback=known_calibration,
        metavar="styles|plain|FOLDER",
        help="Images to score and to compensate with: those of --data, each in a "
        "random look, so that more of what is not seen is kept, or all as they are; or any folder "
        f"of images without labels  [{CALIBRATION}].",
    ),
    click.option(
        "--num-calibration",
        type=click.IntRange(1),
        help="Images to compensate with  [256; styles: 2048, each image 8 times at most].",
    ),
    click.option(
        "--per-head",
        is_flag=True,
        help="Choose the head dims of each head separately, as many in every head. Needs "
        "--no-compensate; accuracy is better with compensation.",
    ),
)

training_options = _combined(
    click.option("--epochs", type=click.IntRange(0), help="Epochs after pruning  [4]."),
    click.option("--batch-size", type=click.IntRange(1), help="Images per training step  [32]."),
    click.option("--lr", type=Number(0, min_open=True), help="Peak learning rate."),
    click.option(
        "--algorithm",
        callback=known_algorithm,
        help=f"How to learn from several domains: {', '.join(domains.ALGORITHMS)}  [by recipe, "
        "else erm].",
    ),
    click.option(
        "--algorithm-arg",
        "algorithm_args",
        multiple=True,
        callback=key_values,
        metavar="KEY=VALUE",
        help="Argument of --algorithm, such as penalty=0.5; may be given again.",
    ),
    click.option(
        "--looks",
        type=click.Choice(list(TO_TRAIN)),
        help="Show each image in a random look at each draw, before pruning and after; calm: grey, "
        "inverted, edges, other colours, ...; all: textures and the amplitudes of another domain "
        "too  [before pruning: all; after it by recipe].",
    ),
    click.option(
        "--feature-weight",
        type=Number(0),
        help="After pruning, with a dense model to learn from: weight of the distance of all "
        "tokens  [by recipe].",
    ),
)


schedule_options = _combined(
    click.option(
        "--schedule",
        type=click.Choice(SCHEDULES),
        default="one-shot",
        show_default=True,
        help="How the cut comes about. iterative: in --steps, with training between; regularised: "
        "units to go are shrunk by a growing decay first; soft: shrunk after each epoch, chosen "
        "anew each time. The last two train without averages of weights before the cut.",
    ),
    click.option(
        "--steps", type=click.IntRange(2), help=f"Cuts of --schedule iterative  [{STEPS}]."
    ),
    click.option(
        "--step-epochs",
        type=click.IntRange(1),
        help=f"Epochs of each training before the last cut  [{STEP_EPOCHS}].",
    ),
)
