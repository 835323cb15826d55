"""What the options of `run` come to: the one place that turns them into what is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from torch import nn

import domains
from cli.options.across import check_across
from cli.options.precision import half
from cli.options.said import algorithm_said, budget, clock, compensation, metric_and_kinds
from cli.options.schedules import STEP_EPOCHS, STEPS, Schedule
from cli.running.models import check_classes
from cli.running.saved import load_saved
from cli.running.settings import RunSettings, adapted
from cli.running.starts import TIMM, Start
from domains.measuring import timing


@dataclass(frozen=True)
class Job:
    """What the options of `run` come to.

    Attributes
    ----------
    model : callable
        Gives the model that training starts from.
    fresh : callable, optional
        Gives it with weights drawn anew; None where a saved model is started from.
    split : Split
    settings : RunSettings
    """

    model: Callable[[], nn.Module]
    fresh: Callable[[], nn.Module] | None
    split: domains.Split
    settings: RunSettings


def make_job(
    found: domains.DomainData,
    start: Start = TIMM,
    *,
    progress: bool = False,
    model_name: str,
    pretrained: bool,
    weights: Path | None,
    img_size: int | None,
    num_classes: int | None,
    model_args: dict[str, Any],
    target: str,
    split_by: str,
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
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    algorithm: str | None,
    algorithm_args: dict[str, Any],
    looks: str | None,
    feature_weight: float | None,
    dense_epochs: int | None,
    dense_lr: float | None,
    dense: Path | None,
    recipe: str | None,
    schedule: str,
    steps: int | None,
    step_epochs: int | None,
    distill: bool | None,
    bench_batch_size: int,
    bench_seconds: float,
    seed: int,
    device: str,
    amp: bool,
) -> Job:
    """Turn the options of `run` into what is done: the one place that does, for `sweep` too.

    Parameters
    ----------
    found : DomainData
    start : Start
        What models are named after, and the recipes where nothing is said.
    progress : bool
        Whether bars are shown.
    **options
        As `run` takes them, less the places of data and results.
    """
    said: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "device": device, "amp": amp}
    said |= {**algorithm_said(algorithm, algorithm_args), "looks": looks}
    if steps is not None and schedule != "iterative":
        raise click.UsageError("--steps needs --schedule iterative")
    if step_epochs is not None and schedule == "one-shot":
        raise click.UsageError("--step-epochs needs another --schedule than one-shot")
    if target_latency is not None and schedule == "iterative":
        raise click.UsageError("--target-latency needs another --schedule than iterative")
    if per_head and compensate is not False:
        raise click.UsageError("--per-head needs --no-compensate")
    share = budget(ratio, target_macs, target_params, target_latency)
    chosen_metric, chosen_kinds = metric_and_kinds(metric, kinds)
    by_name = recipe or domains.default_recipe(compensated=compensate is not False)
    own = start.recovery if recipe is None else None
    if distill is None:
        distill = own is None and domains.RECIPES[by_name].distill
    if feature_weight and not distill:
        raise click.UsageError("--feature-weight needs --distill, or a recipe that distils")
    split = domains.leave_one_out(found, target, seed=seed, split_by=split_by)  # type: ignore[arg-type]
    check_across(across_domains, chosen_metric, split.sources)

    def load(pretrained: bool, weights: Path | None) -> nn.Module:
        return start.load(
            model_name,
            pretrained=pretrained,
            weights=weights,
            img_size=img_size,
            num_classes=len(found.classes) if num_classes is None else num_classes,
            model_args=model_args,
            seed=seed,
        )

    def dense_model() -> nn.Module:
        model = load(pretrained, weights) if dense is None else load_saved(dense)
        check_classes(model, len(found.classes), found.root)
        return model

    after = own or start.recovery_for(by_name)
    later = {**said, "feature_weight": feature_weight}
    settings = RunSettings(
        model=model_name,
        share=share,
        pruning={
            "metric": chosen_metric,
            "scope": scope,
            "kinds": chosen_kinds,
            "ignore": ignore,
            "round_to": round_to,
            "min_units": min_units,
            "normalise": normalise,
            "per": per,
            "num_samples": num_samples,
            "compensate": compensation(compensate is not False, compensate_by),
            "num_calibration": num_calibration,
            "per_head": per_head,
        },
        dense=None
        if dense is not None or dense_epochs == 0
        else adapted(start.dense, epochs=dense_epochs, lr=dense_lr, **said),
        recovery=None if epochs == 0 else adapted(after, epochs=epochs, lr=lr, **later),
        origin={
            "pretrained": pretrained,
            "weights": None if weights is None else str(weights),
            "dense_from": None if dense is None else str(dense),
            "img_size": img_size,
            "num_classes": num_classes,
            "model_args": model_args,
            "split_by": split_by,
        },
        recipe=by_name if own is None else None,
        schedule=Schedule(
            schedule,
            (steps or STEPS) if schedule == "iterative" else 1,
            None
            if schedule == "one-shot"
            else adapted(after, epochs=step_epochs or STEP_EPOCHS, lr=lr, **later),
        ),
        distill=distill,
        lr_by_share=own is None and domains.RECIPES[by_name].by_share and lr is None,
        timing=timing.TimingSettings(
            batch_size=bench_batch_size,
            device=device,
            amp=half(amp, device),
            seconds=bench_seconds,
        ),
        calibration=calibration or start.calibration,
        across_domains=across_domains,
        device=device,
        amp=amp,
        seed=seed,
        latency=clock(latency_table, latency_batch_size, device, progress),
    )
    saved = dense is not None or Path(model_name).is_dir()
    return Job(dense_model, None if saved else lambda: load(False, None), split, settings)
