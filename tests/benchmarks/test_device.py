from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks.device.command import main
from benchmarks.device.record import Record
from benchmarks.device.settings import Settings
from benchmarks.device.steps import STEPS
from benchmarks.device.worker import Stopped, run_step, stoppable
from benchmarks.runtimes import NotHere

ROOT = Path(__file__).parents[2]
CUT_AFTER = "latency-vit-b-plain"

# of Python 3.12 and later, in a process where earlier tests have used threads
forks = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@dataclass(frozen=True)
class Resumed:
    """A run that was killed after a step, and went on."""

    out: Path
    killed: dict[str, bytes]
    page_then: str
    code: int
    page: str


def _pictures(root: Path) -> Path:
    draw = np.random.default_rng(0)
    for domain in ("clay", "ink", "wool"):
        for kind in ("dot", "line"):
            (root / domain / kind).mkdir(parents=True)
            for i in range(6):
                pixels = draw.integers(0, 255, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / domain / kind / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """The whole command at tiny size: killed once a step is done, and called again."""
    folder = tmp_path_factory.mktemp("device")
    out, data = folder / "out", _pictures(folder / "pictures")
    call = [sys.executable, "-m", "benchmarks.device", f"--out={out}", f"--data={data}"]
    call += ["--tiny", "--device=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(call, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while first.poll() is None and not (out / f"{STEPS[3].name}.json").exists():
        time.sleep(0.02)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    finished = [step.name for step in STEPS[1:3]]
    killed = {name: (out / f"{name}.json").read_bytes() for name in finished}
    page_then = (out / "device.md").read_text(encoding="utf-8")
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, check=False)
    page = (out / "device.md").read_text(encoding="utf-8")
    return Resumed(out, killed, page_then, done.returncode, page)


def _record(resumed: Resumed, name: str) -> dict:
    return json.loads((resumed.out / f"{name}.json").read_text(encoding="utf-8"))


def test_a_killed_run_left_a_page_of_what_was_done(resumed: Resumed) -> None:
    assert "fp32, batch 1, eager |" in resumed.page_then
    assert "| Training in bfloat16 | cut |  | not reached |" in resumed.page_then


def test_a_run_goes_on_and_measures_nothing_twice(resumed: Resumed) -> None:
    assert resumed.code == 0, resumed.page
    assert CUT_AFTER in resumed.killed
    for name, content in resumed.killed.items():
        assert (resumed.out / f"{name}.json").read_bytes() == content


def test_each_step_is_done_or_says_why_not(resumed: Resumed) -> None:
    for step in STEPS:
        record = _record(resumed, step.name)
        assert f"## {step.title}\n" in resumed.page
        assert record["state"] in ("done", "not here")
        assert record["state"] == "done" or record["reason"] in resumed.page
        assert not [row for row in record["rows"].values() if "failed" in row]


def test_what_needs_a_gpu_is_on_the_page_with_its_reason(resumed: Resumed) -> None:
    assert "not here: CUDA graphs need a CUDA device" in resumed.page
    assert "not here: 2:4 sparsity needs a CUDA device" in resumed.page
    assert "skipped" in resumed.page
    assert "no CUDA device" in resumed.page


def test_the_page_names_machine_versions_command_and_commit(resumed: Resumed) -> None:
    facts = _record(resumed, "environment")["facts"]
    for said in (facts["device"], f"torch {facts['torch']}", "--tiny --device=cpu", "at commit"):
        assert said in resumed.page


def test_models_take_turns_with_an_empty_op(resumed: Resumed) -> None:
    row = _record(resumed, CUT_AFTER)["rows"]["fp32, batch 2, eager"]
    assert row["models"]["dense"]["speedup"] == 1
    assert row["rounds"] >= 5
    assert row["floor_ms"] > 0


def test_wrapped_models_learn_what_they_learn_alone(resumed: Resumed) -> None:
    for row in _record(resumed, "distributed")["rows"].values():
        assert row["weights_off"] < row["moved"] / 100


def test_accuracy_is_measured_on_the_unseen_domain(resumed: Resumed) -> None:
    row = _record(resumed, "accuracy")["rows"]["clay, seed 0"]
    assert 0 <= row["pruned"]["target_accuracy"] <= 1
    assert 0.3 < row["macs_kept"] < 0.6


def _refused(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code in (1, 2)
    return result.output


def test_a_folder_of_other_settings_is_refused(resumed: Resumed) -> None:
    said = _refused("--out", resumed.out, "--quick", "--device", "cpu")
    assert "holds results of" in said
    assert "choose another --out" in said


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    assert "holds something else" in _refused("--out", tmp_path, "--tiny", "--device", "cpu")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == [
        "letter.txt"
    ]


def test_a_budget_is_a_time(tmp_path: Path) -> None:
    assert "give 90s or 8m" in _refused("--out", tmp_path / "out", "--budget", "soon")


def test_a_failed_row_says_why_and_the_others_are_measured(tmp_path: Path) -> None:
    def fails() -> dict:
        raise RuntimeError("out of memory\nat some place")

    record = Record(tmp_path / "step.json", {})
    record.attempt("large", fails)
    record.attempt("small", lambda: {"ms": 1.0})
    record.finish()
    again = Record(tmp_path / "step.json", {})
    assert again.rows["large"]["failed"] == "RuntimeError: out of memory"
    assert again.rows["small"]["ms"] == 1.0
    assert again.data["reason"] == "rows that failed: 1"


def test_rows_that_time_did_not_reach_are_named_and_measured_later(tmp_path: Path) -> None:
    record = Record(tmp_path / "step.json", {})
    record.attempt("first", lambda: {"ms": 1.0})
    record.deadline = 0.0
    record.attempt("second", lambda: {"ms": 2.0})
    record.finish()
    again = Record(tmp_path / "step.json", {})
    assert again.state == "cut"
    assert "second" in again.data["reason"]

    def twice() -> dict:
        raise AssertionError("measured twice")

    again.attempt("first", twice)
    again.attempt("second", lambda: {"ms": 2.0})
    again.finish()
    assert again.state == "done"


def test_what_is_not_here_is_a_row_with_the_reason(tmp_path: Path) -> None:
    def lacks() -> dict:
        raise NotHere("no such device")

    record = Record(tmp_path / "step.json", {})
    record.attempt("row", lacks)
    assert record.rows["row"]["not_here"] == "no such device"


def test_what_other_settings_measured_is_not_taken_over(tmp_path: Path) -> None:
    record = Record(tmp_path / "step.json", {"weights": "a"})
    record.attempt("row", lambda: {"ms": 1.0})
    assert not Record(tmp_path / "step.json", {"weights": "b"}).rows


@forks
def test_a_step_is_ended_at_its_limit_and_keeps_what_it_has(tmp_path: Path) -> None:
    settings = Settings(tmp_path, "cpu", "full")
    record = run_step("latency-vit-b-plain", settings, {}, 1.0, "fork")
    assert record.state == "cut"
    assert "ended at its limit of 1 s" in record.data["reason"]


@forks
def test_a_step_that_cannot_run_has_failed_with_its_reason(tmp_path: Path) -> None:
    record = run_step("environment", Settings(tmp_path, "cuda:99", "tiny"), {}, 60, "fork")
    assert record.state == "failed"
    assert record.data["reason"]


@forks
def test_sigterm_ends_the_step(tmp_path: Path) -> None:
    settings = Settings(tmp_path, "cpu", "full")
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(Stopped), stoppable():
        run_step("latency-vit-b-plain", settings, {}, 60, "fork")
    data = json.loads((tmp_path / "latency-vit-b-plain.json").read_text(encoding="utf-8"))
    assert data["state"] == "cut"
    assert data["reason"].startswith("interrupted")
