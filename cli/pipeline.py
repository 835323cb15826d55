"""The whole job in stages that can be resumed: dense, pruned, recovered, evaluated, timed.

Each finished stage leaves ``<stage>.json`` in the run's directory with the settings it was made
with; ``--resume`` takes such a stage as it is, and refuses one that was made otherwise.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

import depgraph
import domains
import pruners
from cli.models import example_inputs
from cli.output import environment, note, write_json
from depgraph import DepgraphError
from domains import FinetuneSettings, Split, timing


@dataclass(frozen=True)
class RunSettings:
    """What one run does.

    Attributes
    ----------
    model : str
        How the dense model is called in the result.
    share : dict
        ``{"ratio": r}`` or ``{"target": {...}}``.
    pruning : dict
        Other arguments of `pruners.prune`.
    dense, recovery : FinetuneSettings
        Before and after pruning; None leaves the stage out.
    distill : bool
        Learn from the dense model's outputs after pruning.
    """

    model: str
    share: dict[str, Any]
    pruning: dict[str, Any]
    dense: FinetuneSettings | None
    recovery: FinetuneSettings | None
    distill: bool = False
    timing: timing.TimingSettings = field(default_factory=timing.TimingSettings)
    seed: int = 0


def recovery_settings(**said: Any) -> FinetuneSettings:
    """The recipe after pruning, with what was said on the command line in its place."""
    return _settings(domains.RECOVERY, said)


def dense_settings(**said: Any) -> FinetuneSettings:
    """The recipe of the dense model, with what was said on the command line in its place."""
    return _settings(FinetuneSettings(), said)


def _settings(base: FinetuneSettings, said: dict[str, Any]) -> FinetuneSettings:
    given = {name: value for name, value in said.items() if value is not None}
    epochs = given.get("epochs", base.epochs)
    given.setdefault("warmup_epochs", min(base.warmup_epochs, epochs / 4))
    return replace(base, **given)


def run_pipeline(
    model: nn.Module,
    split: Split,
    settings: RunSettings,
    out: Path,
    *,
    resume: bool = False,
    dense_from: nn.Module | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Fine-tune, prune, fine-tune again, evaluate and time.

    Parameters
    ----------
    model : nn.Module
        The pretrained model; it is trained in place.
    split : Split
    settings : RunSettings
    out : Path
        The run's directory, new or empty unless `resume`.
    resume : bool
        Take finished stages as they are, and continue an unfinished one.
    dense_from : nn.Module, optional
        A dense model fine-tuned earlier, in place of the first stage.
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
    dense = dense_from if dense_from is not None else stages.dense()
    small = stages.pruned(dense)
    before = copy.deepcopy(small)
    small = stages.recovered(small, dense)
    return stages.result(dense, before, small)


class _Stages:
    def __init__(
        self, model: nn.Module, split: Split, settings: RunSettings, out: Path, progress: bool
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
                key = next(k for k in made_with if record["made_with"].get(k) != made_with[k])
                raise DepgraphError(
                    f"stage '{name}' in '{self.out}' was made with {key}="
                    f"{record['made_with'].get(key)!r}, not {made_with[key]!r}; choose another "
                    "--out"
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
        return {"model": self.settings.model, "target": self.split.target, "train": sizes}

    def _train(
        self, name: str, model: nn.Module, settings: FinetuneSettings, teacher: nn.Module | None
    ) -> dict[str, Any]:
        trained = domains.finetune(
            model,
            self.split,
            settings,
            self.out / f"{name}-training",
            resume=True,
            progress=self.progress,
            teacher=teacher,
        )
        depgraph.save(model.eval(), self.out / name)
        return {"history": list(trained.history), "best_epoch": trained.best_epoch}

    def dense(self) -> nn.Module:
        """The dense model, fine-tuned on the sources."""
        settings = self.settings.dense
        if settings is None:
            return self.model
        made_with = {**self._protocol(), "recipe": asdict(settings)}
        finished = (self.out / "dense.json").exists()
        self._stage("dense", made_with, lambda: self._train("dense", self.model, settings, None))
        return depgraph.load(self.out / "dense") if finished else self.model

    def pruned(self, dense: nn.Module) -> nn.Module:
        """The sliced model, before any training."""

        def make() -> dict[str, Any]:
            dense.eval()
            batches = domains.batches(dense, self.split, batch_size=16, seed=self.settings.seed)
            small, plan = pruners.prune(
                dense,
                example_inputs(dense),
                **self.settings.share,
                **self.settings.pruning,
                batches=batches,
                seed=self.settings.seed,
            )
            depgraph.save(small, self.out / "pruned-only")
            kinds = {g.name: g.kind for g in depgraph.trace(dense, example_inputs(dense)).groups}
            kept = {
                name: len(plan.kept_units.get(name, range(n))) for name, n in plan.sizes.items()
            }
            groups = [
                {"name": name, "kind": kinds[name], "size": size, "kept": kept[name]}
                for name, size in plan.sizes.items()
            ]
            return {"groups": groups}

        made_with = {**self._protocol(), **self.settings.share, **self.settings.pruning}
        self._stage("pruned-only", made_with, make)
        return depgraph.load(self.out / "pruned-only")

    def recovered(self, small: nn.Module, dense: nn.Module) -> nn.Module:
        """The pruned model, fine-tuned again."""
        settings = self.settings.recovery
        if settings is None:
            depgraph.save(small, self.out / "pruned")
            return small
        teacher = dense if self.settings.distill else None
        made_with = {
            **self._protocol(),
            "recipe": asdict(settings),
            "distill": self.settings.distill,
        }
        finished = (self.out / "pruned.json").exists()
        self._stage("pruned", made_with, lambda: self._train("pruned", small, settings, teacher))
        return depgraph.load(self.out / "pruned") if finished else small

    def result(self, dense: nn.Module, before: nn.Module, small: nn.Module) -> dict[str, Any]:
        """Accuracies, sizes and speeds, as one row."""
        device = self.settings.recovery.device if self.settings.recovery else None
        accuracy = {
            name: domains.evaluate(model, self.split, device=device, progress=self.progress)
            for name, model in (("dense", dense), ("pruned-only", before), ("pruned", small))
        }
        models = {"dense": dense.eval(), "pruned": small.eval()}
        shape = tuple(example_inputs(dense).shape[1:])
        timings = timing.compare(models, shape, self.settings.timing)
        row: dict[str, Any] = {
            "model": self.settings.model,
            "metric": self.settings.pruning["metric"],
            "ratio": self.settings.share.get("ratio"),
            "target": self.settings.share.get("target"),
            "target_domain": self.split.target,
        }
        for name, model in models.items():
            row[name] = {
                **self._accuracies(accuracy[name]),
                "params": sum(p.numel() for p in model.parameters()),
                "macs": depgraph.count_macs(model, example_inputs(model)),
                "latency_ms": timings[name].latency_ms,
                "timing": asdict(timings[name]),
            }
        row["pruned_only"] = self._accuracies(accuracy["pruned-only"])
        row["speedup"] = timings["pruned"].speedup
        row["groups"] = self.records["pruned-only"]["groups"]
        row["history"] = {
            name: self.records[name]["history"]
            for name in ("dense", "pruned")
            if name in self.records
        }
        row["seconds"] = {name: record["seconds"] for name, record in self.records.items()}
        row |= {"seed": self.settings.seed, "settings": self._plain(), **environment()}
        write_json(self.out / "result.json", row)
        return row

    def _accuracies(self, accuracy: dict[str, float]) -> dict[str, Any]:
        sources = [share for name, share in accuracy.items() if name != self.split.target]
        return {
            "accuracy": accuracy,
            "source_accuracy": sum(sources) / len(sources),
            "target_accuracy": accuracy[self.split.target],
        }

    def _plain(self) -> dict[str, Any]:
        """The settings as plain data."""
        plain = asdict(self.settings)
        plain["pruning"] = {key: str(value) for key, value in plain["pruning"].items()}
        return plain
