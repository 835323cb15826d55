"""What is said on standard error, where there is no terminal and where a log is asked for."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from tests.cli.conftest import TINY, Invoke
from tests.cli.test_sweep import GRID, written

EPOCH = (
    r"^(?:\S+ )?{}: epoch {} of 2, loss \d\S*, validation loss .* accuracy \d+\.\d%.* ETA \d+ s$"
)


@pytest.fixture
def run(data: Path, tmp_path: Path) -> list[object]:
    words = ["run", *TINY, "--data", data, "--target=wool", "--out", tmp_path / "run"]
    quick = ["--epochs=2", "--dense-epochs=2", "--batch-size=6", "--bench-seconds=0"]
    return [*words, *quick, "--metric=l2", "--no-compensate"]


def epochs(text: str) -> list[tuple[str, int]]:
    """Stage and number of each line that tells of an epoch."""
    lines = [(stage, n) for stage in ("dense", "pruned", "training") for n in (1, 2)]
    return [
        (stage, n) for stage, n in lines if len(re.findall(EPOCH.format(stage, n), text, re.M)) == 1
    ]


ALL = [("dense", 1), ("dense", 2), ("pruned", 1), ("pruned", 2)]


def test_without_a_terminal_each_epoch_is_a_line(invoke: Invoke, run: list[object]) -> None:
    answer = invoke(*run)
    assert answer.exit_code == 0, answer.output
    assert epochs(answer.stderr) == ALL
    assert "\x1b" not in answer.stderr and all(answer.stderr.splitlines())


def test_quiet_says_nothing_but_errors(invoke: Invoke, run: list[object], tmp_path: Path) -> None:
    answer = invoke(*run, "-q")
    assert answer.exit_code == 0 and answer.stderr == "" and "accuracy" not in answer.stderr
    again = invoke("-q", *run)
    assert again.exit_code == 1 and "not empty" in again.stderr


def test_verbose_logs_with_the_time_beside_json_too(invoke: Invoke, run: list[object]) -> None:
    answer = invoke(*run, "--json", "-v")
    assert answer.exit_code == 0, answer.output
    assert epochs(answer.stderr) == ALL
    assert re.search(r"^\d{4}-\d\d-\d\dT\S+ cut by l2: \d", answer.stderr, re.M)
    assert "accuracy on wool" in answer.stderr
    assert not logging.getLogger("domains").handlers  # nothing of it stays behind


def test_the_log_of_a_run_in_a_sweep_has_its_epochs(invoke: Invoke, tmp_path: Path) -> None:
    text = GRID.replace("[0.5, 0.75]", "0.5").replace('["l2", "random"]', '"l2"')
    text = text.replace("epochs = 1", "epochs = 2")
    assert invoke("sweep", written(tmp_path, text), "--out", tmp_path / "out").exit_code == 0
    (log,) = (tmp_path / "out").glob("*/log.txt")
    (dense,) = (tmp_path / "out" / "dense").glob("*/log.txt")
    assert epochs(log.read_text()) == [("pruned", 1), ("pruned", 2)]
    assert epochs(dense.read_text()) == [("dense", 1), ("dense", 2)]
