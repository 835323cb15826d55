"""Recipes and algorithms beside each other on the digits: accuracy after the same cut and epochs.

``python -m benchmarks.recovery --out DIR`` trains one dense model for each target, prunes it once,
and recovers it in every way; what is finished is not made again. Nothing is chosen by the target.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch

import depgraph
import domains
import pruners
from cli.output import emit, percent, table, write_json
from domains import DIGITS_RECIPE, DIGITS_RECOVERY, RECIPES, FinetuneSettings, Split

EPOCHS = 3
_LOOKS = ("batch_size", "hflip", "crop_scale", "crop_ratio", "color_jitter", "grayscale")


def ways(share: float) -> dict[str, tuple[FinetuneSettings, bool]]:
    """What is compared: settings, and whether the dense model is a teacher."""
    looks = {name: getattr(DIGITS_RECOVERY, name) for name in _LOOKS}
    looks |= {"epochs": EPOCHS, "warmup_epochs": 0.2, "device": "cpu"}
    out = {
        f"recipe {name}": (replace(recipe.settings_for(share), **looks), recipe.distill)
        for name, recipe in RECIPES.items()
    }
    base = replace(DIGITS_RECOVERY, **looks)
    for name in domains.ALGORITHMS:
        out[f"algorithm {name}"] = (replace(base, algorithm=name), False)
    out["ema"] = (replace(base, ema_decay=0.99), False)
    out["logits"] = (base, True)
    out["logits and features"] = (replace(base, feature_weight=1.0), True)
    out["logits, features and swad"] = (
        replace(base, feature_weight=1.0, algorithm="swad"),
        True,
    )
    return out


def dense_and_pruned(split: Split, ratio: float, seed: int, out: Path) -> float:
    """Make the two models, unless they are there; the share of the MACs that is left."""
    record = out / "cut.json"
    if not record.exists():
        model = domains.digits_model(seed=seed)
        settings = replace(DIGITS_RECIPE, seed=seed, device="cpu")
        domains.finetune(model, split, settings, out / "dense-training", resume=True)
        depgraph.save(model.eval(), out / "dense")
        example = torch.zeros(1, 3, 32, 32)
        batches = domains.batches(model, split, seed=seed)
        small, plan = pruners.prune(model, example, "obs", ratio, kinds="auto", batches=batches)
        depgraph.save(small, out / "pruned-only")
        write_json(record, {"share": plan.macs / depgraph.count_macs(model, example)})
    return json.loads(record.read_text())["share"]


def measured(split: Split, model: Any) -> dict[str, float]:
    """Mean accuracy on the sources' validation parts, and on the unseen domain."""
    accuracy = domains.evaluate(model, split, device="cpu")
    return {
        "source": mean(accuracy[name] for name in split.sources),
        "unseen": accuracy[split.target],
    }


def recover(split: Split, way: str, share: float, seed: int, out: Path) -> dict[str, float]:
    """Accuracies of one way, and its seconds."""
    settings, taught = ways(share)[way]
    place = out / way.replace(" ", "-").replace(",", "")
    if not (place / "row.json").exists():
        model = depgraph.load(out / "pruned-only")
        teacher = depgraph.load(out / "dense") if taught else None
        result = domains.finetune(
            model, split, replace(settings, seed=seed), place, resume=True, teacher=teacher
        )
        row = {**measured(split, model), "seconds": result.seconds}
        write_json(place / "row.json", row)
    return json.loads((place / "row.json").read_text())


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("recovery"), show_default=True)
@click.option("--target", "targets", multiple=True, default=("outline", "poster"))
@click.option("--seeds", default=1, show_default=True)
@click.option("--ratio", default=0.7, show_default=True, help="Share of units removed.")
@click.option("--per-class", default=80, show_default=True, help="Digits of each class.")
@click.option("--way", "chosen", multiple=True, help="Only these.")
@click.option("--json", "as_json", is_flag=True)
def main(
    out: Path,
    targets: tuple[str, ...],
    seeds: int,
    ratio: float,
    per_class: int,
    chosen: tuple[str, ...],
    as_json: bool,
) -> None:
    """Compare recipes and algorithms on the digits."""
    root = domains.write_digits(out / "digits", per_class=per_class)
    found = domains.load_domains(root)
    rows: dict[str, list[dict[str, float]]] = {}
    for target in targets:
        for seed in range(seeds):
            split = domains.leave_one_out(found, target, seed=seed, split_by="stem")
            place = out / f"{target}-{ratio:g}-seed{seed}"
            share = dense_and_pruned(split, ratio, seed, place)
            for name in ("dense", "pruned-only"):
                row = {**measured(split, depgraph.load(place / name)), "seconds": 0.0}
                rows.setdefault(name, []).append(row)
            for way in chosen or ways(share):
                rows.setdefault(way, []).append(recover(split, way, share, seed, place))
    means = {way: {k: mean(row[k] for row in all_) for k in all_[0]} for way, all_ in rows.items()}
    columns = ["", "sources", "unseen", "seconds"]
    lines = [
        (way, percent(row["source"]), percent(row["unseen"]), f"{row['seconds']:.0f}")
        for way, row in means.items()
    ]
    title = f"{EPOCHS} epochs, ratio {ratio:g}, mean over {', '.join(targets)} and {seeds} seeds"
    emit({"rows": rows, "means": means}, as_json, table(title, columns, lines))


if __name__ == "__main__":
    main()
