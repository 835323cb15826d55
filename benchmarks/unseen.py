"""What pruning keeps of a domain that was not seen: every way to cut and to train, side by side.

``python -m benchmarks.unseen --data ROOT --weights FILE --out DIR`` trains one dense model for each
target and seed, in random looks, cuts it in every way to every share of the MACs and trains each
cut on. What is finished is not made again; each row goes to ``DIR/rows.jsonl`` when it is done, and
a table of means ends it. Losses are points of accuracy against that dense model. The target is
looked at for its accuracy alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch
from torch import nn

import depgraph
import domains
import pruners
from benchmarks.peer import torch_pruning_to
from benchmarks.unseen_ways import CUTS, PEER, START, TRAININGS, known_ways
from cli.options.calibration import calibrated_with
from cli.output import emit, environment, percent, table, write_json
from cli.running.models import example_inputs, load_model
from domains import FinetuneSettings, Split

MODEL = "vit_small_patch14_dinov2"


@dataclass(frozen=True)
class Study:
    """What all rows have in common."""

    split: Split
    seed: int
    weights: Path | None
    place: Path
    dense_epochs: int
    epochs: int
    amp: bool

    def settings(self, base: FinetuneSettings, epochs: int) -> FinetuneSettings:
        """A recipe for this study."""
        return replace(base, epochs=epochs, seed=self.seed, amp=self.amp)

    def dense(self) -> tuple[nn.Module, dict[str, float]]:
        """The dense model, trained in looks, and its accuracy by domain."""
        record = self.place / "dense.json"
        if not record.exists():
            model = load_model(
                MODEL,
                pretrained=self.weights is None,
                weights=self.weights,
                img_size=98,
                num_classes=len(self.split.classes),
                seed=self.seed,
            )
            base = self.settings(FinetuneSettings(looks="all"), self.dense_epochs)
            domains.finetune(model, self.split, base, self.place / "dense-training", resume=True)
            self._keep(model, "dense", {})
        return self._kept("dense")

    def cut(self, name: str, macs: float) -> tuple[nn.Module, dict[str, float]]:
        """The dense model cut in one way, before any training."""
        place = f"{name}-{macs:g}"
        if name == PEER:
            return self._by_peer(place, macs)
        if not (self.place / f"{place}.json").exists():
            model, how = self.dense()[0], CUTS[name]
            images = sum(map(len, self.split.train.values()))
            count = images if how.num_calibration == -1 else how.num_calibration
            looked_at = calibrated_with(
                how.calibration,
                how.metric,
                model,
                self.split,
                num_samples=None,
                num_calibration=count,
                seed=self.seed,
            )
            began = time.perf_counter()
            small, plan = pruners.prune(
                model,
                example_inputs(model),
                how.metric,
                target={"macs": macs},
                seed=self.seed,
                **how.options,
                **looked_at,
            )
            seconds = time.perf_counter() - began
            share = plan.macs / depgraph.count_macs(model, example_inputs(model))
            self._keep(small, place, {"macs_kept": share, "seconds": seconds})
        return self._kept(place)

    def _by_peer(self, place: str, macs: float) -> tuple[nn.Module, dict[str, float]]:
        """As `cut`; made anew each time, since nothing but its own code loads it."""
        model = self.dense()[0]
        small = torch_pruning_to(model, example_inputs(model), macs)
        if not (self.place / f"{place}.json").exists():
            self._judge(small, place, {})
        return small, self._accuracy(place)

    def trained(self, name: str, macs: float, way: str) -> dict[str, float]:
        """Accuracy by domain of a cut after training."""
        if way.endswith(START):
            return self._averaged(name, macs, way.removesuffix(START))
        place = f"{name}-{macs:g}-{way}-{self.epochs}"
        if not (self.place / f"{place}.json").exists():
            model, recipe = self.cut(name, macs)[0], TRAININGS[way]
            result = domains.finetune(
                model,
                self.split,
                self.settings(recipe.settings_for(macs), self.epochs),
                self.place / f"{place}-training",
                resume=True,
                teacher=self.dense()[0] if recipe.distill else None,
            )
            said = {"best_epoch": result.best_epoch, "seconds": result.seconds}
            (self._judge if name == PEER else self._keep)(model, place, said)
        return self._accuracy(place)

    def _averaged(self, name: str, macs: float, way: str) -> dict[str, float]:
        """Of the mean of the weights before and after a training."""
        self.trained(name, macs, way)
        after = f"{name}-{macs:g}-{way}-{self.epochs}"
        if not (self.place / f"{after}{START}.json").exists():
            model, before = self._kept(after)[0], self.cut(name, macs)[0].state_dict()
            with torch.no_grad():
                for key, weight in model.named_parameters():
                    weight.lerp_(before[key], 0.5)
            self._judge(model, f"{after}{START}", {})
        return self._accuracy(f"{after}{START}")

    def _keep(self, model: nn.Module, name: str, said: dict[str, Any]) -> None:
        depgraph.save(model.eval(), self.place / name)
        self._judge(model, name, said)

    def _judge(self, model: nn.Module, name: str, said: dict[str, Any]) -> None:
        accuracy = domains.evaluate(model, self.split, amp=self.amp)
        write_json(self.place / f"{name}.json", {"accuracy": accuracy, **said})

    def _kept(self, name: str) -> tuple[nn.Module, dict[str, float]]:
        return depgraph.load(self.place / name).eval(), self._accuracy(name)

    def _accuracy(self, name: str) -> dict[str, float]:
        accuracy: dict[str, float] = json.loads((self.place / f"{name}.json").read_text())[
            "accuracy"
        ]
        return accuracy

    def row(self, macs: float, cut: str, training: str | None) -> dict[str, Any]:
        """Accuracies of one way, and its losses in points."""
        dense = self._means(self.dense()[1])
        after = self.cut(cut, macs)[1] if training is None else self.trained(cut, macs, training)
        now = self._means(after)
        return {
            "target_domain": self.split.target,
            "seed": self.seed,
            "macs": macs,
            "cut": cut,
            "training": training,
            "epochs": 0 if training is None else self.epochs,
            "dense": dense,
            "pruned": now,
            "loss": {name: 100 * (dense[name] - now[name]) for name in dense},
            "accuracy": after,
        }

    def _means(self, accuracy: dict[str, float]) -> dict[str, float]:
        sources = mean(accuracy[name] for name in self.split.sources)
        return {"sources": sources, "unseen": accuracy[self.split.target]}


def studied(study: Study, macs: tuple[float, ...], ways: tuple[str, ...]) -> Iterator[dict]:
    """A row for each cut, and for each training of it."""
    for share in macs:
        for way in ways:
            cut, _, training = way.partition("/")
            yield study.row(share, cut, training or None)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--weights", type=click.Path(path_type=Path), help=f"Of {MODEL}  [timm's].")
@click.option("--out", type=click.Path(path_type=Path), default=Path("unseen"), show_default=True)
@click.option("--target", "targets", multiple=True, help="Unseen domains  [each in turn].")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,), show_default=True)
@click.option("--macs", multiple=True, type=float, default=(0.36,), show_default=True)
@click.option(
    "--way",
    "ways",
    multiple=True,
    callback=known_ways,
    default=("plain", "plain/gentle", "styles", "styles/looks"),
    show_default=True,
    help="CUT, or CUT/TRAINING.",
)
@click.option("--dense-epochs", default=10, show_default=True)
@click.option("--epochs", default=4, show_default=True)
@click.option("--amp/--no-amp", default=False, help="Train and evaluate in mixed precision.")
@click.option("--json", "as_json", is_flag=True)
def main(
    data: Path,
    weights: Path | None,
    out: Path,
    targets: tuple[str, ...],
    seeds: tuple[int, ...],
    macs: tuple[float, ...],
    ways: tuple[str, ...],
    dense_epochs: int,
    epochs: int,
    amp: bool,
    as_json: bool,
) -> None:
    """Compare ways to prune by what they lose on the sources and on the unseen domain."""
    found = domains.load_domains(data)
    rows = []
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for target in targets or found.domains:
            split = domains.leave_one_out(found, target, seed=seed, split_by="stem")
            place = out / f"{target}-seed{seed}"
            study = Study(split, seed, weights, place, dense_epochs, epochs, amp)
            for row in studied(study, macs, ways):
                rows.append(row)
                with (out / "rows.jsonl").open("a") as file:
                    file.write(json.dumps({**row, **environment()}) + "\n")
    emit({"rows": rows}, as_json, table("losses in points", _COLUMNS, _lines(rows)))


_COLUMNS = (
    *("MACs", "cut", "training", "epochs", "sources", "unseen"),
    *("sources lost", "unseen lost", "unseen per source", "rows"),
)


def _lines(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Means over targets and seeds, with the standard error of the loss."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["macs"], row["cut"], row["training"], row["epochs"])
        groups.setdefault(key, []).append(row)
    lines = []
    for (macs, cut, training, epochs), group in groups.items():
        means = (percent(mean(r["pruned"][what] for r in group)) for what in ("sources", "unseen"))
        lost = (_with_error([r["loss"][what] for r in group]) for what in ("sources", "unseen"))
        both = [mean(r["loss"][what] for r in group) for what in ("unseen", "sources")]
        share = f"{both[0] / both[1]:.1f}" if both[1] > 0 else ""
        way = (f"{macs:g}", cut, training or "none", str(epochs))
        lines.append((*way, *means, *lost, share, str(len(group))))
    return lines


def _with_error(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} ± {stdev(values) / len(values) ** 0.5:.1f}"


if __name__ == "__main__":
    main()
