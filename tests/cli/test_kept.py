"""A training after the cut that improved nothing is not shown as one that did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from cli.running import kept
from cli.showing import figures
from tests.cli.conftest import TINY, Invoke
from tests.cli.test_report import result, write


def trained(best: int | None, start: float | None = 0.6) -> dict[str, Any]:
    judged = None if start is None else {"val_accuracy": start}
    return {"training": {"pruned": {"epochs": 2, "best_epoch": best, "start": judged}}}


def test_a_run_whose_training_improved_nothing_says_so(
    invoke: Invoke, data: Path, tmp_path: Path
) -> None:
    words = ["run", *TINY, "--data", data, "--target=wool", "--out", tmp_path / "run"]
    quick = ["--epochs=1", "--dense-epochs=0", "--batch-size=6", "--bench-seconds=0"]
    still = ["--recipe=gentle", "--lr=1e-30", "--metric=l2"]  # no step changes a weight
    ran = invoke(*words, *quick, *still)
    assert ran.exit_code == 0, ran.output
    assert "training did not improve it" in ran.stdout and "fine-tuned" not in ran.stdout
    row = json.loads((tmp_path / "run" / "result.json").read_text())
    training = row["training"]["pruned"]
    assert training["best_epoch"] == 0
    assert training["start"]["val_accuracy"] == row["history"]["pruned"][0]["val_accuracy"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "pruned, kept as compensated" in page and "fine-tuned" not in page
    again = invoke(*words, *quick, *still, "--resume")
    assert again.exit_code == 0 and "training did not improve it" in again.stdout


@pytest.mark.parametrize(
    ("best", "compensate", "says"),
    [
        (0, True, "pruned, kept as compensated"),
        (0, False, "pruned, kept as cut"),
        (2, True, "pruned, fine-tuned"),
        (None, True, "pruned, fine-tuned"),
    ],
)
def test_the_pruned_model_is_called_what_it_is(
    best: int | None, compensate: bool, says: str
) -> None:
    row = trained(best) | {"settings": {"pruning": {"compensate": compensate}}}
    row["training"]["pruned"].update({} if best is not None else {"best_epoch": 1})
    assert kept.pruned_says(row) == says
    assert ("did not improve" in kept.selection_says(row)) == (best == 0)


def test_the_start_is_a_point_of_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[int], list[float]]] = []
    plot = Axes.plot

    def record(self: Axes, x: list[int], y: list[float], **how: Any) -> Any:
        drawn.append((x, y))
        return plot(self, x, y, **how)

    monkeypatch.setattr(Axes, "plot", record)
    row = result("ink") | {"history": {"dense": [], "pruned": [{"epoch": 1, "val_accuracy": 0.5}]}}
    for start in (None, 0.6):
        figures.training_curves(row | trained(0, start))
    assert drawn == [([1], [50]), ([0, 1], [60, 50])]


def test_a_study_counts_the_runs_that_training_did_not_improve(
    invoke: Invoke, tmp_path: Path
) -> None:
    rows = [result("ink", seed) | trained(best) for seed, best in enumerate((0, 1, 0))]
    answer = invoke("report", write(tmp_path, *rows), "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["kept_start"] == 2 and found["table"][0]["kept_start"] == 2
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<b>2</b><span>kept as they were cut" in page and "2 not improved by training" in page
    assert "2 kept as they were cut" in (tmp_path / "report" / "report.md").read_text()
