"""``prune``: score, cut and save, without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

import depgraph
import domains
import pruners
from cli.options.across import across_domains as across
from cli.options.across import check_across
from cli.options.calibration import CALIBRATION, calibrated_with, is_folder, reads_labels
from cli.options.latency import predicted
from cli.options.params import Bytes
from cli.options.precision import with_precision
from cli.options.said import budget, clock, compensation, metric_and_kinds
from cli.options.shared import (
    compute_options,
    json_option,
    optional_model_options,
    out_option,
    pruning_options,
    resume_option,
    seed_option,
    split_option,
)
from cli.output import MACS_NOTE, check_apart
from cli.running.made import check_model_place, force_option
from cli.running.models import check_classes, example_inputs, load_model
from cli.running.pruned import report
from cli.running.saved import save_model
from cli.running.sharded import prune_sharded
from cli.verbosity import progress
from depgraph import DepgraphError


@click.command(epilog=MACS_NOTE)
@optional_model_options
@pruning_options
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Directory of safetensors to prune shard by shard, never in memory as a whole; MODEL may "
    "be left out where its config.json says what it is of.",
)
@click.option("--max-memory", type=Bytes(), help="With --checkpoint: cap on memory, as 2GiB.")
@resume_option
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder of images to score with.",
)
@click.option("--target", help="Held-out target domain: its images are not used.")
@split_option
@out_option
@force_option
@seed_option
@compute_options
@json_option
def prune(
    model_name: str | None,
    pretrained: bool,
    weights: Path | None,
    img_size: int | None,
    num_classes: int | None,
    model_args: dict[str, Any],
    ratio: float | None,
    target_macs: float | None,
    target_params: float | None,
    target_latency: float | None,
    latency_table: Path | None,
    latency_batch_size: int,
    metric: str | None,
    scope: str,
    kinds: tuple[str, ...],
    ignore: tuple[str, ...],
    round_to: int | str | None,
    min_units: int,
    normalise: str | None,
    per: str | None,
    num_samples: int | None,
    across_domains: str | None,
    compensate: bool | None,
    compensate_by: str,
    calibration: str | None,
    num_calibration: int | None,
    per_head: bool,
    checkpoint: Path | None,
    max_memory: int | None,
    resume: bool,
    data: Path | None,
    target: str | None,
    split_by: str,
    out: Path,
    force: bool,
    seed: int,
    device: str,
    amp: bool,
    as_json: bool,
) -> None:
    """Prune MODEL and save the smaller one in --out."""
    share = budget(ratio, target_macs, target_params, target_latency)
    choices = {
        **share,
        "scope": scope,
        "ignore": ignore,
        "round_to": round_to,
        "min_units": min_units,
        "normalise": normalise,
        "per": per,
    }
    check_model_place(out, force)
    latency = clock(latency_table, latency_batch_size, device, progress=progress(as_json))
    if checkpoint is not None:
        _refuse_others(click.get_current_context())
        prune_sharded(
            checkpoint,
            model_name,
            out,
            metric or "l2",
            max_memory=max_memory,
            resume=resume,
            as_json=as_json,
            seed=seed,
            structure={
                "img_size": img_size,
                "num_classes": num_classes,
                "model_args": model_args,
            },
            choices={
                **choices,
                "kinds": kinds or None,
                "latency": {**latency, "device": "cpu"},
            },
        )
        return
    if model_name is None:
        raise click.UsageError("name a MODEL, or give a --checkpoint")
    if resume or max_memory is not None:
        raise click.UsageError("--resume and --max-memory go with --checkpoint")
    if target is not None and data is None:
        raise click.UsageError("--target is a domain of --data; give both")
    metric, chosen_kinds = metric_and_kinds(metric, kinds)
    scorer = pruners.make_metric(metric, seed=seed)
    unlabelled = is_folder(calibration)
    if scorer.needs_data and data is None and (not unlabelled or reads_labels(metric)):
        raise DepgraphError(f"metric '{metric}' looks at images; say where with --data")
    if compensate and data is None and not unlabelled:
        raise DepgraphError(
            "--compensate looks at images; say where with --data, or --calibration FOLDER"
        )
    found = None
    if data is not None:
        check_apart(out, data)
        if scorer.needs_data or compensate is not False:
            found = domains.load_domains(data, progress=progress(as_json))
    if found is not None and num_classes is None and not Path(model_name).is_dir():
        num_classes = len(found.classes)
    sources = None if found is None else [d for d in found.samples if d != target]
    check_across(across_domains, metric, sources)
    model = load_model(
        model_name,
        pretrained=pretrained,
        weights=weights,
        img_size=img_size,
        num_classes=num_classes,
        model_args=model_args,
        seed=seed,
    )
    if found is not None and data is not None:
        check_classes(model, len(found.classes), data)
    model.to(device)
    samples: Any = found
    if found is not None and target is not None:
        samples = domains.leave_one_out(found, target, seed=seed, split_by=split_by)  # type: ignore[arg-type]
    numbers = {"num_samples": num_samples, "num_calibration": num_calibration}
    images = calibrated_with(calibration, metric, model, samples, seed=seed, **numbers)
    scorer = with_precision(scorer, device, amp)
    if samples is not None:
        scorer = across(scorer, across_domains, model, samples, num_samples=num_samples, seed=seed)
    compensated = (samples is not None or unlabelled) and compensate is not False
    small, plan = pruners.prune(
        model,
        example_inputs(model, img_size),
        scorer,
        **choices,
        latency=latency,
        kinds=chosen_kinds,
        **images,
        compensate=compensation(compensated, compensate_by),
        per_head=per_head,
        seed=seed,
    )
    save_model(small.cpu(), out)
    graph = depgraph.trace(model, example_inputs(model, img_size))
    dense = {"params": graph.num_params, "macs": graph.macs}
    said = {
        "model": model_name,
        "arguments": {"img_size": img_size, "num_classes": num_classes, "model_args": model_args},
        "pretrained": pretrained,
        "metric": metric,
        **share,
        **predicted(graph, plan, share, latency),
        "scope": scope,
        "across_domains": across_domains,
        "compensated": compensated,
        "calibration": (calibration or CALIBRATION) if compensated else None,
        "seed": seed,
    }
    report(out, said, plan, dense, as_json)


_OF_IMAGES = frozenset(
    (
        *("pretrained", "weights", "data", "target", "split_by", "device", "amp"),
        *("num_samples", "across_domains", "compensate", "compensate_by"),
        *("calibration", "num_calibration"),
        "per_head",
    )
)
"""Options that mean nothing for a checkpoint on disk."""


def _refuse_others(context: click.Context) -> None:
    """Refuse what was said on the command line and would not be heeded."""
    for param in context.command.params:
        name = param.name or ""
        said = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if said and name in _OF_IMAGES:
            raise click.UsageError(f"{param.opts[0]} does not go with --checkpoint")
