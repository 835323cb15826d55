"""The whole job in stages that can be resumed: dense, pruned, recovered, evaluated, timed.

Each finished stage leaves ``<stage>.json`` in the run's directory with the settings it was made
with; ``--resume`` takes such a stage as it is, and refuses one that was made otherwise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

import depgraph
import domains
import pruners
from cli.latency import predicted
from cli.models import example_inputs
from cli.output import environment, note, write_json
from cli.precision import with_precision
from cli.settings import RunSettings, deciding
from depgraph import DepgraphError
from domains import FinetuneSettings, Split, timing


def run_pipeline(
    model: Callable[[], nn.Module],
    split: Split,
    settings: RunSettings,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Fine-tune, prune, fine-tune again, evaluate and time.

    Parameters
    ----------
    model : callable
        Gives the pretrained model, on the CPU; not called when its stage is finished.
    split : Split
    settings : RunSettings
    out : Path
        The run's directory, new or empty unless `resume`. Gets the models ``dense``,
        ``pruned-only`` and ``pruned``, and ``result.json``.
    resume : bool
        Take finished stages as they are, and continue an unfinished one.
    progress : bool
        Bars on standard error.

    Returns
    -------
    dict
        The result row, as `run --json` prints it.

    Raises
    ------
    DepgraphError
        For a directory in use, a stage made with other settings, and whatever a stage refuses.
    """
    if out.is_dir() and any(out.iterdir()) and not resume:
        raise DepgraphError(
            f"'{out}' is not empty; choose another --out, or continue it with --resume"
        )
    stages = _Stages(model, split, settings, out, progress)
    stages.dense()
    stages.pruned()
    stages.recovered()
    return stages.result()


class _Stages:
    def __init__(
        self,
        model: Callable[[], nn.Module],
        split: Split,
        settings: RunSettings,
        out: Path,
        progress: bool,
    ) -> None:
        self.model = model
        self.split = split
        self.settings = settings
        self.out = out
        self.progress = progress
        self.records: dict[str, dict[str, Any]] = {}

    def _stage(
        self, name: str, made_with: dict[str, Any], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The record of a stage: read when it is finished, made otherwise."""
        path = self.out / f"{name}.json"
        made_with = json.loads(json.dumps(made_with))
        if path.exists():
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if record["made_with"] != made_with:
                raise DepgraphError(
                    f"stage '{name}' in '{self.out}' was made with "
                    f"{_difference(record['made_with'], made_with)}; choose another --out"
                )
        else:
            if self.progress:
                note(f"{name} ...")
            start = time.perf_counter()
            record = make()
            record |= {"seconds": time.perf_counter() - start, "made_with": made_with}
            write_json(path, record)
        self.records[name] = record
        return record

    def _protocol(self) -> dict[str, Any]:
        sizes = {domain: len(samples) for domain, samples in self.split.train.items()}
        return {
            "model": self.settings.model,
            **self.settings.origin,
            "target_domain": self.split.target,
            "train": sizes,
            "seed": self.settings.seed,
        }

    def _train(
        self,
        name: str,
        model: nn.Module,
        recipe: FinetuneSettings | None,
        teacher: nn.Module | None,
    ) -> dict[str, Any]:
        if recipe is None:
            depgraph.save(model.eval(), self.out / name)
            return {"history": []}
        trained = domains.finetune(
            model,
            self.split,
            recipe,
            self.out / f"{name}-training",
            resume=True,
            progress=self.progress,
            teacher=teacher,
        )
        depgraph.save(model.eval(), self.out / name)
        return {"history": list(trained.history), "best_epoch": trained.best_epoch}

    def dense(self) -> None:
        """The dense model: fine-tuned on the sources, or as it came."""
        recipe = self.settings.dense
        made_with = {**self._protocol(), "recipe": deciding(recipe)}
        self._stage("dense", made_with, lambda: self._train("dense", self.model(), recipe, None))

    def pruned(self) -> None:
        """The sliced model, before any training."""
        made_with = {**self._protocol(), **self.settings.share, **self.settings.pruning}
        self._stage("pruned-only", made_with, self._prune)

    def recovered(self) -> None:
        """The pruned model, fine-tuned again."""
        recipe, distill = self._recovery(), self.settings.distill

        def make() -> dict[str, Any]:
            teacher = self._load("dense") if distill else None
            return self._train("pruned", self._load("pruned-only"), recipe, teacher)

        made_with = {**self._protocol(), "recipe": deciding(recipe), "distill": distill}
        self._stage("pruned", made_with, make)

    def _recovery(self) -> FinetuneSettings | None:
        recipe = self.settings.recovery
        if recipe is None or not self.settings.lr_by_share:
            return recipe
        return domains.scale_lr(recipe, self.records["pruned-only"]["macs_kept"])

    def _load(self, name: str) -> nn.Module:
        return depgraph.load(self.out / name).eval()

    def _prune(self) -> dict[str, Any]:
        settings = self.settings
        dense = self._load("dense").to(settings.device)
        metric = pruners.make_metric(settings.pruning["metric"], seed=settings.seed)
        small, plan = pruners.prune(
            dense,
            example_inputs(dense),
            **settings.share,
            **{**settings.pruning, "metric": with_precision(metric, settings.device, settings.amp)},
            batches=domains.batches(dense, self.split, batch_size=16, seed=settings.seed),
            seed=settings.seed,
            latency=settings.latency,
        )
        depgraph.save(small.cpu(), self.out / "pruned-only")
        graph = depgraph.trace(dense, example_inputs(dense))
        kinds = {g.name: g.kind for g in graph.groups}
        kept = {name: len(plan.kept_units.get(name, range(n))) for name, n in plan.sizes.items()}
        groups = [
            {"name": name, "kind": kinds[name], "size": size, "kept": kept[name]}
            for name, size in plan.sizes.items()
        ]
        said = predicted(graph, plan, settings.share, settings.latency)
        return {"groups": groups, "macs_kept": plan.macs / graph.macs, **said}

    def result(self) -> dict[str, Any]:
        """Accuracies, sizes and speeds, as one row."""
        settings = self.settings
        names = {"dense": "dense", "pruned_only": "pruned-only", "pruned": "pruned"}
        seconds = {name: record["seconds"] for name, record in self.records.items()}
        start = time.perf_counter()
        models = {key: self._load(name) for key, name in names.items()}
        accuracy = {key: self._accuracies(self._evaluate(model)) for key, model in models.items()}
        seconds["evaluate"] = time.perf_counter() - start
        timings = self._timings({key: models[key] for key in ("dense", "pruned")})
        row: dict[str, Any] = {
            "model": settings.model,
            "metric": settings.pruning["metric"],
            "ratio": settings.share.get("ratio"),
            "target": settings.share.get("target"),
            "target_domain": self.split.target,
        }
        pruned_only = self.records["pruned-only"]
        if "predicted_latency_kept" in pruned_only:
            row["predicted_latency_kept"] = pruned_only["predicted_latency_kept"]
        for key, measured in timings.items():
            row[key] = {
                **accuracy[key],
                "params": sum(p.numel() for p in models[key].parameters()),
                "macs": depgraph.count_macs(models[key], example_inputs(models[key])),
                "latency_ms": measured.latency_ms,
                "timing": asdict(measured),
            }
        row["pruned_only"] = accuracy["pruned_only"]
        row["speedup"] = timings["pruned"].speedup
        row["groups"] = self.records["pruned-only"]["groups"]
        row["training"] = {key: self._training(key) for key in ("dense", "pruned")}
        row["history"] = {key: self.records[key]["history"] for key in ("dense", "pruned")}
        row |= {"seconds": seconds, "seed": settings.seed, "settings": settings.plain()}
        row |= environment()
        write_json(self.out / "result.json", row)
        return row

    def _training(self, name: str) -> dict[str, float]:
        """What the fine-tuning of a stage took, validation included."""
        recipe = self.settings.dense if name == "dense" else self.settings.recovery
        history = self.records[name]["history"]
        images = sum(len(samples) for samples in self.split.train.values())
        steps = 0 if recipe is None else len(history) * -(-images // recipe.batch_size)
        seconds = sum(epoch["seconds"] for epoch in history)
        speed = {"steps_per_second": steps / seconds} if steps else {}
        return {"epochs": len(history), "steps": steps, "seconds": seconds, **speed}

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        return domains.evaluate(
            model,
            self.split,
            device=self.settings.device,
            amp=self.settings.amp,
            progress=self.progress,
        )

    def _timings(self, models: dict[str, nn.Module]) -> dict[str, timing.Timing]:
        if self.progress:
            note(f"timing for about {self.settings.timing.seconds:g} s ...")
        shape = tuple(example_inputs(models["dense"]).shape[1:])
        return timing.compare(models, shape, self.settings.timing)

    def _accuracies(self, accuracy: dict[str, float]) -> dict[str, Any]:
        sources = [share for name, share in accuracy.items() if name != self.split.target]
        return {
            "accuracy": accuracy,
            "source_accuracy": sum(sources) / len(sources),
            "target_accuracy": accuracy[self.split.target],
        }


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first setting that is not the same, as ``name=old, not new``."""
    for name in {**now, **before}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            return f"{name}: {_difference(old, new)}"
        if old != new:
            return f"{name}={old!r}, not {new!r}"
    return "the same"
