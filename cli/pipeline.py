"""The whole job in stages that can be resumed: dense, pruned, recovered, evaluated, timed.

Each finished stage leaves ``<stage>.json`` in the run's directory with the settings it was made
with; ``--resume`` takes such a stage as it is, and refuses one that was made otherwise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

import depgraph
import domains
from cli.cut import cut
from cli.models import example_inputs
from cli.output import environment, note, write_json
from cli.settings import RunSettings, deciding
from cli.tracking import tracked
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
    dense_at: Path | None = None,
    fresh: Callable[[], nn.Module] | None = None,
    log: Callable[[str], None] | None = None,
    more: Mapping[str, Any] | None = None,
    track: str | None = None,
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
    dense_at : Path, optional
        Where `train_dense` left the dense model that several runs start from; by default it is
        made in `out`.
    fresh : callable, optional
        Gives the model with weights drawn anew; for the control "reinit" alone.
    log : callable, optional
        Gets a line as each stage begins; by default standard error, if there is `progress`.
    more : mapping, optional
        What else is put into the row.
    track : str or None
        One of `cli.tracking.TRACKERS`, to log the epochs of both trainings to.

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
    stages = _Stages(model, split, settings, out, progress, dense_at or out, fresh, log, track)
    stages.dense()
    stages.pruned()
    stages.recovered()
    return stages.result(more or {})


def train_dense(
    model: Callable[[], nn.Module],
    split: Split,
    settings: RunSettings,
    out: Path,
    *,
    progress: bool = True,
    log: Callable[[str], None] | None = None,
) -> None:
    """The first stage alone, resumed where it was begun: for runs that share their dense model.

    Parameters are those of `run_pipeline`, whose `dense_at` is this `out`.
    """
    stages = _Stages(model, split, settings, out, progress, out, None, log, None)
    stages.dense()
    stages.dense_accuracy()


def dense_identity(split: Split, settings: RunSettings) -> dict[str, Any]:
    """All that decides what the dense model becomes: runs with the same one can share it."""
    return {**_protocol(split, settings), "recipe": deciding(settings.dense)}


def _protocol(split: Split, settings: RunSettings) -> dict[str, Any]:
    return {
        "model": settings.model,
        **settings.origin,
        "target_domain": split.target,
        "train": {domain: len(samples) for domain, samples in split.train.items()},
        "seed": settings.seed,
    }


class _Stages:
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

    def _stage(
        self, name: str, made_with: dict[str, Any], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The record of a stage: read when it is finished, made otherwise."""
        path = self._place(name) / f"{name}.json"
        made_with = json.loads(json.dumps(made_with))
        if path.exists():
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if record["made_with"] != made_with:
                raise DepgraphError(
                    f"stage '{name}' in '{path.parent}' was made with "
                    f"{_difference(record['made_with'], made_with)}; choose another --out"
                )
        else:
            self.log(f"{name} ...")
            start = time.perf_counter()
            record = make()
            record |= {"seconds": time.perf_counter() - start, "made_with": made_with}
            write_json(path, record)
        self.records[name] = record
        return record

    def _place(self, name: str) -> Path:
        return self.dense_at if name.startswith("dense") else self.out

    def _train(
        self,
        name: str,
        model: nn.Module,
        recipe: FinetuneSettings | None,
        teacher: nn.Module | None,
    ) -> dict[str, Any]:
        if recipe is None:
            depgraph.save(model.eval(), self._place(name) / name)
            return {"history": []}
        stage = "dense" if name == "dense" else "recovery"
        config = _protocol(self.split, self.settings) | asdict(recipe)
        with tracked(self.track, self.out, stage, config) as on_epoch:
            trained = domains.finetune(
                model,
                self.split,
                recipe,
                self._place(name) / f"{name}-training",
                resume=True,
                progress=self.progress,
                teacher=teacher,
                on_epoch=on_epoch,
            )
        depgraph.save(model.eval(), self._place(name) / name)
        return {"history": list(trained.history), "best_epoch": trained.best_epoch}

    def dense(self) -> None:
        """The dense model: fine-tuned on the sources, or as it came."""
        recipe = self.settings.dense
        made_with = dense_identity(self.split, self.settings)
        self._stage("dense", made_with, lambda: self._train("dense", self.model(), recipe, None))

    def dense_accuracy(self) -> dict[str, float]:
        """Accuracy of the dense model by domain."""
        made_with = dense_identity(self.split, self.settings)
        record = self._stage(
            "dense-accuracy", made_with, lambda: {"accuracy": self._evaluate(self._load("dense"))}
        )
        accuracy: dict[str, float] = record["accuracy"]
        return accuracy

    def pruned(self) -> None:
        """The sliced model, before any training."""
        settings = self.settings
        made_with = {**_protocol(self.split, settings), **settings.share, **settings.pruning}
        if settings.control is not None:
            made_with["control"] = settings.control
        if settings.across_domains is not None:
            made_with["across_domains"] = settings.across_domains
        self._stage("pruned-only", made_with, self._prune)

    def recovered(self) -> None:
        """The pruned model, fine-tuned again."""
        recipe, distill = self._recovery(), self.settings.distill

        def make() -> dict[str, Any]:
            teacher = self._load("dense") if distill else None
            return self._train("pruned", self._load("pruned-only"), recipe, teacher)

        made_with = {
            **_protocol(self.split, self.settings),
            "recipe": deciding(recipe),
            "distill": distill,
        }
        self._stage("pruned", made_with, make)

    def _recovery(self) -> FinetuneSettings | None:
        recipe = self.settings.recovery
        if recipe is None or not self.settings.lr_by_share:
            return recipe
        return domains.scale_lr(recipe, self.records["pruned-only"]["macs_kept"])

    def _load(self, name: str) -> nn.Module:
        return depgraph.load(self._place(name) / name).eval()

    def _prune(self) -> dict[str, Any]:
        dense = self._load("dense").to(self.settings.device)
        small, record = cut(dense, self.split, self.settings, self.fresh)
        depgraph.save(small, self.out / "pruned-only")
        return record

    def result(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Accuracies, sizes and speeds, as one row."""
        settings = self.settings
        names = {"dense": "dense", "pruned_only": "pruned-only", "pruned": "pruned"}
        seconds = {name: record["seconds"] for name, record in self.records.items()}
        start = time.perf_counter()
        models = {key: self._load(name) for key, name in names.items()}
        measured_shares = {"dense": self.dense_accuracy()} | {
            key: self._evaluate(models[key]) for key in ("pruned_only", "pruned")
        }
        accuracy = {key: self._accuracies(shares) for key, shares in measured_shares.items()}
        seconds["evaluate"] = time.perf_counter() - start
        timings = self._timings({key: models[key] for key in ("dense", "pruned")})
        row: dict[str, Any] = {
            "model": settings.model,
            "metric": settings.control or settings.pruning["metric"],
            "across_domains": settings.across_domains,
            "ratio": settings.share.get("ratio"),
            "target": settings.share.get("target"),
            "target_domain": self.split.target,
        }
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
        row |= {key: self.records["pruned-only"][key] for key in ("groups", "scores")}
        row["history"] = {key: self.records[key]["history"] for key in ("dense", "pruned")}
        row |= {"seconds": seconds, "seed": settings.seed, "settings": settings.plain()}
        row |= {**environment(), **more}
        write_json(self.out / "result.json", row)
        return row

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        return domains.evaluate(
            model,
            self.split,
            device=self.settings.device,
            amp=self.settings.amp,
            progress=self.progress,
        )

    def _timings(self, models: dict[str, nn.Module]) -> dict[str, timing.Timing]:
        self.log(f"timing for about {self.settings.timing.seconds:g} s ...")
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
