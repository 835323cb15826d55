from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking

from cli.options.tracking import tracked
from domains import EpochRow
from tests.cli.conftest import TINY, Invoke

RUN = ["--target=wool", "--metric=l2", "--batch-size=6", "--bench-seconds=0.1", "--json"]
not_ours = pytest.mark.filterwarnings("default")  # what these tools' own dependencies warn of

ROW: EpochRow = {
    "epoch": 3,
    "lr": 0.5,
    "train_loss": 2.0,
    "val_loss": 1.0,
    "val_accuracy": 0.25,
    "val_accuracies": {"Real World": 0.25},
    "seconds": 1.0,
}


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


def tracked_run(
    invoke: Invoke, data: Path, tracker: str, out: Path
) -> list[tuple[str, list[dict[str, Any]]]]:
    """The two trainings of a run, and the rows that it reports of each."""
    args = ["--dense-epochs=2", "--epochs=1", f"--track={tracker}", "--out", out]
    result = invoke("run", *TINY, "--data", data, *RUN, *args)
    assert result.exit_code == 0, result.output
    history = json.loads(result.stdout)["history"]
    return [("dense", history["dense"]), ("recovery", history["pruned"])]


def test_each_epoch_of_both_trainings_of_a_run_is_in_tensorboard(
    invoke: Invoke, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: track)")
    out = tmp_path / "run"
    for stage, rows in tracked_run(invoke, data, "tensorboard", out):
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
    for name, way in (("wandb", "depgraph-prune[wandb]"), ("tensorboard", "depgraph-prune[track]")):
        args = ["--data", data, *RUN, "--out", out, f"--track={name}"]
        result = invoke("run", *TINY, *args)
        assert result.exit_code == 2 and way in result.stderr.replace("\n", " ")
    assert not out.exists()


def test_an_epoch_is_logged_with_its_settings_by_name(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: track)")
    config = {"model": "vit", "betas": (0.9, 0.99), "share": {"ratio": 0.5}, "none": None}
    with tracked("tensorboard", tmp_path, "dense", config) as on_epoch:
        assert on_epoch is not None
        on_epoch(ROW)
    found = curves(tmp_path / "tracking" / "dense")
    assert found["val_accuracy/Real World"] == [(3, 0.25)] and found["lr"] == [(3, 0.5)]


def test_nothing_is_written_where_nothing_is_tracked(tmp_path: Path) -> None:
    with tracked(None, tmp_path, "dense", {}) as on_epoch:
        assert on_epoch is None
    assert not list(tmp_path.iterdir())


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """MLflow, which finds nothing said by the environment."""
    module = pytest.importorskip("mlflow", reason="mlflow is not installed (extra: mlflow)")
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    yield module
    module.end_run()


def mlflow_runs(mlflow: Any, out: Path) -> dict[str, Any]:
    """What MLflow's own client finds in the store of a run, by the name of the training."""
    client = mlflow.MlflowClient(f"sqlite:///{out / 'tracking' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'depgraph-prune'")
    found = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found)
    return {
        run.info.run_name: (
            run.info.status,
            run.data.params,
            [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train_loss")],
        )
        for run in found
    }


@not_ours
def test_each_run_has_its_epochs_and_settings_in_a_store_of_mlflow_of_its_own(
    invoke: Invoke, data: Path, tmp_path: Path, mlflow: Any
) -> None:
    for name in ("first", "second"):
        trainings = tracked_run(invoke, data, "mlflow", tmp_path / name)
        runs = mlflow_runs(mlflow, tmp_path / name)
        for stage, rows in trainings:
            status, settings, losses = runs.pop(f"{name}-{stage}")
            assert status == "FINISHED" and settings["model_args.embed_dim"] == "32"
            assert losses == [(row["epoch"], pytest.approx(row["train_loss"])) for row in rows]
        assert not runs


@not_ours
def test_a_resumed_training_goes_on_in_the_same_run_of_mlflow(tmp_path: Path, mlflow: Any) -> None:
    for epoch, device in ((1, "cuda"), (2, "cpu")):
        with tracked("mlflow", tmp_path / "run", "dense", {"device": device}) as on_epoch:
            assert on_epoch is not None
            on_epoch({**ROW, "epoch": epoch})
    runs = mlflow_runs(mlflow, tmp_path / "run")
    assert runs["run-dense"] == ("FINISHED", {"device": "cuda"}, [(1, 2.0), (2, 2.0)])


@not_ours
def test_a_server_of_mlflow_that_does_not_answer_is_one_sentence_before_any_work(
    invoke: Invoke, data: Path, tmp_path: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    out = tmp_path / "run"
    result = invoke("run", *TINY, "--data", data, *RUN, "--track=mlflow", "--out", out)
    assert result.exit_code == 1 and "mlflow takes no runs" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not out.exists()


@not_ours
def test_each_epoch_is_in_the_offline_files_of_wandb(
    invoke: Invoke, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (extra: wandb)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    out = tmp_path / "run"
    for stage, rows in tracked_run(invoke, data, "wandb", out):
        name = (out / "tracking" / f"{stage}.wandb").read_text()
        (log,) = (out / "tracking" / "wandb").glob(f"offline-run-*/run-{name}.wandb")
        content = log.read_bytes()
        for word in (f"run-{stage}", "model_args.embed_dim", "val_accuracy/ink"):
            assert word.encode() in content
        for row in rows:
            assert json.dumps(row["train_loss"]).encode() in content


@not_ours
def test_wandb_without_a_login_is_one_sentence_before_any_work(
    invoke: Invoke, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (extra: wandb)")

    def refused(*args: object, **kwargs: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "login", refused)
    out = tmp_path / "run"
    result = invoke("run", *TINY, "--data", data, *RUN, "--track=wandb", "--out", out)
    assert result.exit_code == 1 and "WANDB_MODE=offline" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not out.exists()
