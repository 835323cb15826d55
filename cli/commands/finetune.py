"""``finetune``: train a saved model on all domains but one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table
from torch import nn

import domains
from cli.options.said import algorithm_said
from cli.options.shared import (
    compute_options,
    data_option,
    json_option,
    recipe_option,
    resume_option,
    seed_option,
    split_option,
    target_option,
    track_option,
    training_options,
)
from cli.options.tracking import tracked
from cli.output import check_apart, emit, environment, percent, table, write_json
from cli.running.made import check_model_place, force_option, holds_model, is_record
from cli.running.saved import compensated_share, load_saved, read_record, save_model, saved_in
from cli.running.settings import recovery_settings
from cli.verbosity import progress


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@data_option
@target_option
@split_option
@training_options
@recipe_option
@click.option(
    "--teacher",
    type=click.Path(path_type=Path),
    help="Saved model, usually the dense one, whose outputs are learnt from too.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the trained model goes  [DIR itself].",
)
@force_option
@resume_option
@track_option
@seed_option
@compute_options
@json_option
def finetune(
    directory: Path,
    data: Path,
    target: str,
    split_by: str,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    algorithm: str | None,
    algorithm_args: dict[str, Any],
    looks: str | None,
    feature_weight: float | None,
    recipe: str | None,
    teacher: Path | None,
    out: Path | None,
    force: bool,
    resume: bool,
    track: str | None,
    seed: int,
    device: str,
    amp: bool,
    as_json: bool,
) -> None:
    """Fine-tune the model in DIR on all domains of --data but --target."""
    said = algorithm_said(algorithm, algorithm_args)
    if recipe is not None and domains.RECIPES[recipe].distill and teacher is None:
        raise click.UsageError(f"--recipe {recipe} learns from a dense model; give it as --teacher")
    if feature_weight and teacher is None:
        raise click.UsageError("--feature-weight compares with a dense model; give it as --teacher")
    out = out or saved_in(directory) or directory
    check_apart(out, data)
    check_model_place(out, force)
    found = domains.load_domains(data, progress=progress(as_json))
    model = load_saved(directory, num_classes=len(found.classes), seed=seed)
    split = domains.leave_one_out(found, target, seed=seed, split_by=split_by)  # type: ignore[arg-type]
    share = compensated_share(saved_in(directory) or directory)
    recipe = recipe or domains.default_recipe(compensated=share is not None)
    if domains.RECIPES[recipe].distill and teacher is None:
        recipe = "gentle"  # nothing was said, or it would have been refused
    settings = recovery_settings(
        recipe,
        share,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        device=device,
        amp=amp,
        looks=looks,
        feature_weight=feature_weight,
        **said,
    )
    with tracked(track, out, "recovery", {"model": str(directory), "target": target}) as on_epoch:
        trained = domains.finetune(
            model,
            split,
            settings,
            out / "training",
            resume=resume,
            progress=progress(as_json),
            teacher=None if teacher is None else load_saved(teacher),
            on_epoch=on_epoch,
        )
    before = _finished(out, model, settings, target, trained) if resume else None
    if before is not None:
        emit(before, as_json, _shown(before))
        return
    if domains.processes.is_main():
        save_model(model.eval(), out)
    accuracy = domains.evaluate(model, split, device=device, amp=amp, progress=progress(as_json))
    result = {
        "model": str(directory),
        "target_domain": target,
        "recipe": recipe,
        "algorithm": settings.algorithm,
        "settings": asdict(settings),
        "accuracy": accuracy,
        "best_epoch": trained.best_epoch,
        "start": trained.start,
        "best_val_accuracy": trained.best_val_accuracy,
        "seconds": trained.seconds,
        "history": list(trained.history),
        "seed": seed,
        "out": str(out),
        **environment(),
    }
    write_json(out / "finetune.json", result)
    emit(result, as_json, _shown(result))


def _finished(
    out: Path,
    model: nn.Module,
    settings: domains.FinetuneSettings,
    target: str,
    trained: domains.FinetuneResult,
) -> dict[str, Any] | None:
    """The result of an earlier call that did just this and whose model is still there."""
    path = out / "finetune.json"
    if not (is_record(path) and holds_model(out)):
        return None
    record = read_record(path)
    said = {"settings": asdict(settings), "target_domain": target, "history": trained.history}
    if any(record.get(name) != value for name, value in json.loads(json.dumps(said)).items()):
        return None
    saved, now = load_saved(out).state_dict(), model.state_dict()
    same = saved.keys() == now.keys() and all(torch.equal(saved[n], now[n].cpu()) for n in now)
    return record if same else None


def _shown(result: dict[str, Any]) -> Table:
    rows = [(name, percent(share)) for name, share in result["accuracy"].items()]
    best, epochs = result["best_epoch"], len(result["history"])
    title = f"{result['model']}, best of {epochs} epochs: {best}"
    if best == 0:
        title = f"{result['model']}, kept as it was: none of {epochs} epochs improved it"
    return table(title, ["domain", "accuracy"], rows)
