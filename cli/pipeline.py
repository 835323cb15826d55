"""The whole job in stages that can be resumed: dense, pruned, recovered, evaluated, timed.

Each finished stage leaves ``<stage>.json`` in the run's directory with the settings it was made
with; ``--resume`` takes such a stage as it is, and refuses one that was made otherwise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import depgraph
import domains
import pruners
from cli.models import example_inputs
from cli.output import note, write_json
from cli.precision import with_precision
from cli.rows import result_row
from cli.schedules import shrinking_hooks, shrinking_settings
from cli.settings import RunSettings, deciding
from depgraph import DepgraphError
from domains import FinetuneSettings, Split, processes


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
    processes.join(settings.device)
    if processes.is_main() and out.is_dir() and any(out.iterdir()) and not resume:
        raise DepgraphError(
            f"'{out}' is not empty; choose another --out, or continue it with --resume"
        )
    stages = _Stages(model, split, settings, out, progress)
    stages.dense()
    stages.scheduled()
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
        self.latest = "dense"  # the model that the next cut is made of

    def _stage(
        self,
        name: str,
        made_with: dict[str, Any],
        make: Callable[[], dict[str, Any]],
        together: bool = True,
    ) -> None:
        """The record of a stage: read when it is finished, made otherwise.

        Of several processes all make it `together`, or the main one alone.
        """
        path = self.out / f"{name}.json"
        made_with = json.loads(json.dumps(made_with))
        processes.wait()  # what was written before is there for all
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
            if together or processes.is_main():
                record = {**make(), "made_with": made_with}
                write_json(path, {**record, "seconds": time.perf_counter() - start})
            processes.wait()
            record = json.loads(path.read_text(encoding="utf-8"))
        self.records[name] = record

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
        hooks: domains.Hooks | None = None,
    ) -> dict[str, Any]:
        if recipe is None:
            self._save(model, name)
            return {"history": []}
        trained = domains.finetune(
            model,
            self.split,
            recipe,
            self.out / f"{name}-training",
            resume=True,
            progress=self.progress,
            teacher=teacher,
            hooks=hooks,
        )
        self._save(model, name)
        return {"history": list(trained.history), "best_epoch": trained.best_epoch}

    def _save(self, model: nn.Module, name: str) -> None:
        if processes.is_main():
            depgraph.save(model.eval(), self.out / name)

    def dense(self) -> None:
        """The dense model: fine-tuned on the sources, or as it came."""
        recipe = self.settings.dense
        made_with = {**self._protocol(), "recipe": deciding(recipe)}
        self._stage("dense", made_with, lambda: self._train("dense", self.model(), recipe, None))

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
        made_with = {**self._protocol(), **self.settings.share, **self.settings.pruning}
        schedule = self.settings.schedule
        return made_with if schedule.name == "one-shot" else {**made_with, "steps": schedule.steps}

    def _trained_with(self) -> dict[str, Any]:
        """Of the trainings before the last cut."""
        schedule, distill = self.settings.schedule, self.settings.distill
        training = {"recipe": deciding(schedule.training), "distill": distill}
        return {**self._protocol(), "schedule": schedule.name, **training}

    def _between(self, cut: str, name: str) -> dict[str, Any]:
        recipe = self._rated(self.settings.schedule.training, self.records[cut]["macs_kept"])
        return self._train(name, self._load(cut), recipe, self._teacher())

    def _shrink(self) -> dict[str, Any]:
        schedule = self.settings.schedule
        assert schedule.training is not None
        name = json.dumps(self._cut_with(), sort_keys=True)
        dense = self._load("dense").to(self.settings.device)
        planned = pruners.plan_cut(dense, **self._pruning(dense, self.settings.share))

        def plan(model: nn.Module) -> pruners.PlannedCut:
            arguments = self._pruning(model, self.settings.share)
            return pruners.plan_cut(model, **{**arguments, "compensate": False})

        hooks = shrinking_hooks(schedule.name, planned, plan, name)
        recipe = shrinking_settings(schedule.training)
        model = planned.model.cpu()
        return self._train("shrunk", model, recipe, self._teacher(), hooks)

    def pruned(self) -> None:
        """The sliced model, before any training."""
        share = self._budget(self.settings.schedule.steps)
        made_with = self._cut_with()
        self._stage(
            "pruned-only", made_with, lambda: self._prune(self.latest, "pruned-only", share)
        )

    def recovered(self) -> None:
        """The pruned model, fine-tuned again."""
        recipe, distill = self._recovery(), self.settings.distill

        def make() -> dict[str, Any]:
            return self._train("pruned", self._load("pruned-only"), recipe, self._teacher())

        made_with = {**self._protocol(), "recipe": deciding(recipe), "distill": distill}
        self._stage("pruned", made_with, make)

    def _teacher(self) -> nn.Module | None:
        return self._load("dense") if self.settings.distill else None

    def _recovery(self) -> FinetuneSettings | None:
        return self._rated(self.settings.recovery, self.records["pruned-only"]["macs_kept"])

    def _rated(self, recipe: FinetuneSettings | None, share: float) -> FinetuneSettings | None:
        """The recipe with the rate for a model of which this share of the MACs is left."""
        if recipe is None or not self.settings.lr_by_share:
            return recipe
        return domains.scale_lr(recipe, share)

    def _load(self, name: str) -> nn.Module:
        return depgraph.load(self.out / name).eval()

    def _pruning(self, model: nn.Module, share: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `pruners.prune` for a model on the device."""
        settings = self.settings
        metric = pruners.make_metric(settings.pruning["metric"], seed=settings.seed)
        return {
            **share,
            **settings.pruning,
            "example_inputs": example_inputs(model),
            "metric": with_precision(metric, settings.device, settings.amp),
            "batches": domains.batches(model, self.split, batch_size=16, seed=settings.seed),
            "seed": settings.seed,
        }

    def _prune(self, source: str, name: str, share: dict[str, Any]) -> dict[str, Any]:
        model = self._load(source).to(self.settings.device)
        small, plan = pruners.prune(model, **self._pruning(model, share))
        depgraph.save(small.cpu(), self.out / name)
        dense = self._graph("dense")
        kept = {name: len(plan.kept_units.get(name, range(n))) for name, n in plan.sizes.items()}
        groups = [
            {"name": g.name, "kind": g.kind, "size": g.size, "kept": kept.get(g.name, 0)}
            for g in dense.prunable
        ]
        return {"groups": groups, "macs_kept": plan.macs / dense.macs}

    def result(self) -> dict[str, Any]:
        """Accuracies, sizes and speeds, as one row."""
        row = result_row(self.settings, self.split, self.out, self.records, self.progress)
        write_json(self.out / "result.json", row)
        processes.wait()
        return row


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first setting that is not the same, as ``name=old, not new``."""
    for name in {**now, **before}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            return f"{name}: {_difference(old, new)}"
        if old != new:
            return f"{name}={old!r}, not {new!r}"
    return "the same"
