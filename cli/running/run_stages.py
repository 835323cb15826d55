"""What each stage of a run does: dense training, cuts, trainings between and after them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import depgraph
import domains
import pruners
from cli.options.schedules import shrinking_hooks, shrinking_settings
from cli.options.tracking import tracked
from cli.output import note, write_json
from cli.running.cut import cut, pruning
from cli.running.made import holds_model
from cli.running.models import example_inputs
from cli.running.rows import finished_row, result_row
from cli.running.saved import save_model
from cli.running.settings import RunSettings, deciding
from cli.running.stages import stage_record
from domains import FinetuneSettings, Split
from domains.running import processes


def dense_identity(split: Split, settings: RunSettings) -> dict[str, Any]:
    """All that decides what the dense model becomes: runs with the same one can share it."""
    return {**protocol(split, settings), "recipe": deciding(settings.dense)}


def protocol(split: Split, settings: RunSettings) -> dict[str, Any]:
    return {
        "model": settings.model,
        **settings.origin,
        "target_domain": split.target,
        "train": {domain: len(samples) for domain, samples in split.train.items()},
        "seed": settings.seed,
    }


def stage_names(settings: RunSettings) -> list[str]:
    """The stages of a run, by which its files and directories are called."""
    between = [f"{kind}-{i}" for i in range(1, settings.schedule.steps) for kind in ("cut", "step")]
    shrunk = ["shrunk"] if settings.schedule.shrinks else []
    return ["dense", "dense-accuracy", *between, *shrunk, "pruned-only", "pruned"]


class Stages:
    """The stages of one run, each done once."""

    def __init__(
        self,
        model: Callable[[], nn.Module],
        split: Split,
        settings: RunSettings,
        out: Path,
        progress: bool,
        dense_at: Path,
        fresh: Callable[[], nn.Module] | None,
        log: Callable[[str], None] | None,
        track: str | None,
    ) -> None:
        self.model = model
        self.split = split
        self.settings = settings
        self.out = out
        self.progress = progress
        self.dense_at = dense_at
        self.fresh = fresh
        self.log = log or (note if progress else lambda text: None)
        self.track = track
        self.records: dict[str, dict[str, Any]] = {}
        self.latest = "dense"  # the model that the next cut is made of
        self.did_something = False

    def _stage(
        self,
        name: str,
        made_with: dict[str, Any],
        make: Callable[[], dict[str, Any]],
        together: bool = True,
    ) -> None:
        place = self._place(name)
        if name != "dense-accuracy" and processes.is_main() and not holds_model(place / name):
            (place / f"{name}.json").unlink(missing_ok=True)  # its model is gone
        self.records[name] = stage_record(
            place / f"{name}.json",
            made_with,
            make,
            together=together,
            begin=lambda: self._begin(name),
        )

    def _begin(self, name: str) -> None:
        self.did_something = True
        self.log(f"{name} ...")

    def _place(self, name: str) -> Path:
        return self.dense_at if name.startswith("dense") else self.out

    def _protocol(self) -> dict[str, Any]:
        return protocol(self.split, self.settings)

    def _train(
        self,
        name: str,
        model: nn.Module,
        recipe: FinetuneSettings | None,
        teacher: nn.Module | None,
        hooks: domains.Hooks | None = None,
    ) -> dict[str, Any]:
        if recipe is None:
            self._save(model, name)
            return {"history": []}
        log = {**self._protocol(), **asdict(recipe)}
        stage = "recovery" if name == "pruned" else name
        with tracked(self.track, self.out, stage, log) as on_epoch:
            trained = domains.finetune(
                model,
                self.split,
                recipe,
                self._place(name) / f"{name}-training",
                resume=True,
                progress=self.progress,
                teacher=teacher,
                hooks=hooks,
                on_epoch=on_epoch,
                name=name,
            )
        self._save(model, name)
        return {
            "history": list(trained.history),
            "best_epoch": trained.best_epoch,
            "start": trained.start,
        }

    def _save(self, model: nn.Module, name: str) -> None:
        if processes.is_main():
            save_model(model.eval(), self._place(name) / name)

    def dense(self) -> None:
        """The dense model: fine-tuned on the sources, or as it came."""
        recipe = self.settings.dense
        made_with = dense_identity(self.split, self.settings)
        self._stage("dense", made_with, lambda: self._train("dense", self.model(), recipe, None))

    def dense_accuracy(self) -> dict[str, float]:
        """Accuracy of the dense model by domain."""
        made_with = dense_identity(self.split, self.settings)
        self._stage(
            "dense-accuracy", made_with, lambda: {"accuracy": self._evaluate(self._load("dense"))}
        )
        accuracy: dict[str, float] = self.records["dense-accuracy"]["accuracy"]
        return accuracy

    def scheduled(self) -> None:
        """What comes before the last cut: cuts with training between, or units shrunk."""
        schedule = self.settings.schedule
        for step in range(1, schedule.steps):
            cut, name = f"cut-{step}", f"step-{step}"
            share = self._budget(step)
            make = partial(self._prune, self.latest, cut, share)
            self._stage(cut, self._cut_with(), make, together=False)
            self._stage(name, self._trained_with(), partial(self._between, cut, name))
            self.latest = name
        if schedule.shrinks:
            self._stage("shrunk", {**self._cut_with(), **self._trained_with()}, self._shrink)
            self.latest = "shrunk"

    def _budget(self, step: int) -> dict[str, Any]:
        """Of a cut, relative to the model it is made of."""
        settings = self.settings
        if settings.schedule.steps == 1:
            return settings.share
        return pruners.schedules.step_budget(
            self._graph("dense"),
            self._graph(self.latest),
            step,
            settings.schedule.steps,
            **settings.share,
            kinds=settings.pruning["kinds"],
            ignore=settings.pruning.get("ignore", ()),
        )

    def _graph(self, name: str) -> depgraph.DependencyGraph:
        model = self._load(name)
        return depgraph.trace(model, example_inputs(model))

    def _cut_with(self) -> dict[str, Any]:
        settings = self.settings
        steps = settings.schedule.steps if settings.schedule.name != "one-shot" else None
        more = {
            "control": settings.control,
            "across_domains": settings.across_domains,
            "steps": steps,
        }
        said = {name: value for name, value in more.items() if value is not None}
        how = {"calibration": settings.calibration}
        return {**self._protocol(), **settings.share, **settings.pruning, **how, **said}

    def _trained_with(self) -> dict[str, Any]:
        """Of the trainings before the last cut."""
        schedule, distill = self.settings.schedule, self.settings.distill
        training = {"recipe": deciding(schedule.training), "distill": distill}
        return {**self._protocol(), "schedule": schedule.name, **training}

    def _between(self, cut: str, name: str) -> dict[str, Any]:
        recipe = self._rated(self.settings.schedule.training, self.records[cut]["macs_kept"])
        return self._train(name, self._load(cut), recipe, self._teacher())

    def _shrink(self) -> dict[str, Any]:
        settings = self.settings
        assert settings.schedule.training is not None
        name = json.dumps(self._cut_with(), sort_keys=True)
        dense = self._load("dense").to(settings.device)
        planned = pruners.plan_cut(dense, **pruning(dense, self.split, settings, settings.share))

        def plan(model: nn.Module) -> pruners.PlannedCut:
            arguments = pruning(model, self.split, settings, settings.share)
            return pruners.plan_cut(model, **{**arguments, "compensate": False})

        hooks = shrinking_hooks(settings.schedule.name, planned, plan, name)
        recipe = shrinking_settings(settings.schedule.training)
        return self._train("shrunk", planned.model.cpu(), recipe, self._teacher(), hooks)

    def pruned(self) -> None:
        """The sliced model, before any training."""
        share = self._budget(self.settings.schedule.steps)
        make = partial(self._prune, self.latest, "pruned-only", share)
        self._stage("pruned-only", self._cut_with(), make, together=False)

    def recovered(self) -> None:
        """The pruned model, fine-tuned again."""
        recipe = self._rated(self.settings.recovery, self.records["pruned-only"]["macs_kept"])
        made_with = {
            **self._protocol(),
            "recipe": deciding(recipe),
            "distill": self.settings.distill,
        }

        def make() -> dict[str, Any]:
            return self._train("pruned", self._load("pruned-only"), recipe, self._teacher())

        self._stage("pruned", made_with, make)

    def _teacher(self) -> nn.Module | None:
        return self._load("dense") if self.settings.distill else None

    def _rated(self, recipe: FinetuneSettings | None, share: float) -> FinetuneSettings | None:
        """The recipe with the rate for a model of which this share of the MACs is left."""
        if recipe is None or not self.settings.lr_by_share:
            return recipe
        return domains.scale_lr(recipe, share)

    def _load(self, name: str) -> nn.Module:
        return depgraph.load(self._place(name) / name).eval()

    def _prune(self, source: str, name: str, share: dict[str, Any]) -> dict[str, Any]:
        model = self._load(source).to(self.settings.device)
        dense = self._graph("dense")
        small, record = cut(model, dense, self.split, self.settings, share, self.fresh)
        save_model(small, self.out / name)
        return record

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        return domains.evaluate(
            model,
            self.split,
            device=self.settings.device,
            amp=self.settings.amp,
            progress=self.progress,
        )

    def result(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Accuracies, sizes and speeds, as one row; that of a finished run as it was written."""
        before = finished_row(self.out / "result.json")
        asked = json.loads(json.dumps(self.settings.plain()))
        if before is not None and before["settings"] == asked and not self.did_something:
            return before
        start = time.perf_counter()
        names = {"dense": "dense", "pruned_only": "pruned-only", "pruned": "pruned"}
        models = {key: self._load(name) for key, name in names.items()}
        accuracy = {"dense": self.dense_accuracy()} | {
            key: self._evaluate(models[key]) for key in ("pruned_only", "pruned")
        }
        seconds = {name: record["seconds"] for name, record in self.records.items()}
        seconds["evaluate"] = time.perf_counter() - start
        self.log(f"timing for about {self.settings.timing.seconds:g} s ...")
        images = sum(len(samples) for samples in self.split.train.values())
        target = self.split.target
        row = result_row(self.settings, target, models, accuracy, self.records, images)
        row |= {"seconds": seconds, **more}
        write_json(self.out / "result.json", row)
        processes.wait()
        return row
