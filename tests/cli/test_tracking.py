from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate import tracking

from cli.tracking import tracked
from domains import EpochRow
from tests.cli.conftest import TINY, Invoke

RUN = ["--target=wool", "--metric=l2", "--batch-size=6", "--bench-seconds=0.1", "--json"]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds: (epoch, value) by name."""
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed (extra: track)",
    )
    reader = events.EventAccumulator(str(folder))
    reader.Reload()
    names = reader.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in reader.Scalars(name)] for name in names}


def test_each_epoch_of_both_trainings_of_a_run_is_in_tensorboard(
    invoke: Invoke, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: track)")
    out = tmp_path / "run"
    args = ["--dense-epochs=2", "--epochs=1", "--track=tensorboard", "--out", out]
    result = invoke("run", *TINY, "--data", data, *RUN, *args)
    assert result.exit_code == 0, result.output
    history = json.loads(result.stdout)["history"]
    for stage, rows in (("dense", history["dense"]), ("recovery", history["pruned"])):
        found = curves(out / "tracking" / stage)
        assert {"val_accuracy/clay", "val_accuracy/ink", "lr", "train_loss"} <= set(found)
        for name in ("train_loss", "lr", "val_accuracy"):
            assert found[name] == [(row["epoch"], pytest.approx(row[name])) for row in rows]


def test_finetune_is_tracked_under_its_output(invoke: Invoke, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: track)")
    small, out = tmp_path / "small", tmp_path / "out"
    invoke("prune", *TINY, "--metric=l2", "--num-classes=2", "--out", small)
    args = ["--data", data, "--target=ink", "--epochs=1", "--batch-size=6", "--out", out]
    result = invoke("finetune", small, *args, "--track=tensorboard")
    assert result.exit_code == 0, result.output
    assert len(curves(out / "tracking" / "recovery")["train_loss"]) == 1


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(
    invoke: Invoke, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    out = tmp_path / "run"
    for name, way in (("wandb", "pip install wandb"), ("tensorboard", "depgraph-prune[track]")):
        args = ["--data", data, *RUN, "--out", out, f"--track={name}"]
        result = invoke("run", *TINY, *args)
        assert result.exit_code == 2 and way in result.stderr.replace("\n", " ")
    assert not out.exists()


def test_an_epoch_is_logged_with_its_settings_by_name(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: track)")
    row: EpochRow = {
        "epoch": 3,
        "lr": 0.5,
        "train_loss": 2.0,
        "val_loss": 1.0,
        "val_accuracy": 0.25,
        "val_accuracies": {"Real World": 0.25},
        "seconds": 1.0,
    }
    config = {"model": "vit", "betas": (0.9, 0.99), "share": {"ratio": 0.5}, "none": None}
    with tracked("tensorboard", tmp_path, "dense", config) as on_epoch:
        assert on_epoch is not None
        on_epoch(row)
    found = curves(tmp_path / "tracking" / "dense")
    assert found["val_accuracy/Real World"] == [(3, 0.25)] and found["lr"] == [(3, 0.5)]


def test_nothing_is_written_where_nothing_is_tracked(tmp_path: Path) -> None:
    with tracked(None, tmp_path, "dense", {}) as on_epoch:
        assert on_epoch is None
    assert not list(tmp_path.iterdir())
