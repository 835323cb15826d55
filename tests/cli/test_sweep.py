from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from pruners import METRICS
from tests.cli.conftest import Invoke

GRID = """
data = "digits"
digits_per_class = 4
split_by = "stem"
models = ["vit"]
targets = ["outline"]
ratios = [0.5, 0.75]
metrics = ["l2", "random"]
epochs = 1
dense_epochs = 1
compensate = false
bench_seconds = 0
"""

ROOT = Path(__file__).parents[2]


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Four runs from one dense model, a second each."""
    return written(tmp_path)


def written(tmp_path: Path, text: str = GRID) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return path


def finished(out: Path) -> dict[str, int]:
    """When each run became done, by name."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/done")}


def count(path: Path, words: str) -> int:
    return path.read_text().count(words)


def test_a_sweep_that_was_killed_goes_on_and_does_nothing_twice(
    invoke: Invoke, grid: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    call = [sys.executable, "-m", "cli.main", "sweep", str(grid), "--out", str(out)]
    process = subprocess.Popen(call, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not finished(out) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = finished(out)
    results = {name: (out / name / "result.json").read_bytes() for name in before}
    assert 1 <= len(before) < 4

    result = invoke("sweep", grid, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["done"] == 4
    after = finished(out)
    assert len(after) == 4 and before.items() <= after.items()
    assert results == {name: (out / name / "result.json").read_bytes() for name in before}
    (dense,) = (out / "dense").glob("*/log.txt")
    assert count(dense, " dense ...") == 1
    assert all(count(out / name / "log.txt", "pruned-only ...") == 1 for name in before)
    assert not list(out.glob("*/pruned/model.safetensors"))

    rows = [json.loads(path.read_text()) for path in out.glob("*/result.json")]
    assert {(row["metric"], row["ratio"]) for row in rows} == {
        (metric, ratio) for metric in ("l2", "random") for ratio in (0.5, 0.75)
    }
    assert len({row["dense"]["target_accuracy"] for row in rows}) == 1
    assert all(row["sweep"]["workers"] == 1 for row in rows)


def test_a_run_that_fails_is_kept_with_its_error_and_the_others_go_on(
    invoke: Invoke, tmp_path: Path
) -> None:
    text = GRID.replace('"random"', '"taylor"').replace("[0.5, 0.75]", "0.5")
    grid, out = written(tmp_path, text + "num_samples = 100000\n"), tmp_path / "out"
    result = invoke("sweep", grid, "--out", out, "--json")
    assert result.exit_code == 1
    summary = json.loads(result.stdout)
    assert summary["done"] == 1 and "fewer than num_samples" in summary["failed"][0]["error"]
    failed = out / summary["failed"][0]["name"]
    assert "Traceback" in (failed / "error.txt").read_text() and "taylor" in failed.name
    assert not (failed / "result.json").exists() and not (failed / "done").exists()

    tried = (failed / "error.txt").stat().st_mtime_ns
    again = invoke("sweep", grid, "--out", out)
    assert again.exit_code == 1 and "num_samples" in again.stdout
    assert (failed / "error.txt").stat().st_mtime_ns == tried
    invoke("sweep", grid, "--out", out, "--retry-failed")
    assert (failed / "error.txt").stat().st_mtime_ns > tried


def test_controls_cut_nothing_or_start_anew_at_the_same_cost(
    invoke: Invoke, tmp_path: Path
) -> None:
    text = GRID.replace("ratios = [0.5, 0.75]", "target_macs = 0.5")
    text = text.replace('["l2", "random"]', '"l2"') + 'controls = ["dense", "reinit"]\n'
    out = tmp_path / "out"
    result = invoke("sweep", written(tmp_path, text), "--out", out, "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(path.read_text()) for path in out.glob("*/result.json")]
    rows_of = {row["metric"]: row for row in rows}
    share = {name: row["pruned"]["macs"] / row["dense"]["macs"] for name, row in rows_of.items()}
    assert share["dense"] == 1 and rows_of["dense"]["ratio"] is rows_of["dense"]["target"] is None
    assert share["reinit"] == pytest.approx(share["l2"], abs=0.05)
    assert len(rows_of["reinit"]["history"]["pruned"]) == 2  # as long as dense and pruned together
    assert sum(map(sum, (rows_of["l2"]["scores"]["heads"][s] for s in ("kept", "removed")))) == 16


def test_a_run_of_a_sweep_is_what_run_does(invoke: Invoke, data: Path, tmp_path: Path) -> None:
    model = 'name = "vit_tiny_patch16_224"\npretrained = false\nimg_size = 32\n'
    model += "model_args = { patch_size = 8, depth = 2, embed_dim = 32, num_heads = 4 }\n"
    text = f'data = "{data}"\nmetrics = "l2"\ntargets = "wool"\nseeds = 1\nratios = 0.25\n'
    text += "epochs = 1\ndense_epochs = 1\nbatch_size = 6\nbench_seconds = 0\nround_to = 2\n"
    grid = written(tmp_path, f"{text}[[models]]\n{model}")
    assert invoke("sweep", grid, "--out", tmp_path / "out").exit_code == 0
    (path,) = (tmp_path / "out").glob("*/result.json")
    words = json.loads((path.parent / "config.json").read_text())["arguments"]
    result = invoke(*words, "--data", data, "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    one, other = json.loads(path.read_text()), json.loads(result.stdout)
    for part in ("groups", "pruned_only", "settings"):
        assert one[part] == other[part]
    assert one["pruned"]["accuracy"] == other["pruned"]["accuracy"]


@pytest.mark.skipif(not find_spec("ray"), reason="Ray is in the extra 'cluster'")
@pytest.mark.slow
def test_two_workers_do_what_one_does(grid: Path, tmp_path: Path) -> None:
    # In a process of its own: Ray's sockets outlast it, which the suite takes as errors.
    rows = []
    for workers in (["--workers", "2"], []):
        out = tmp_path / f"out{len(workers)}"
        call = [sys.executable, "-m", "cli.main", "sweep", str(grid), "--out", str(out), "--json"]
        done = subprocess.run([*call, *workers], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        assert summary["done"] == 4 and summary["dense_models"] == 1
        (dense,) = (out / "dense").glob("*/log.txt")
        assert count(dense, " dense ...") == 1
        found = (json.loads(path.read_text()) for path in sorted(out.glob("*/result.json")))
        rows.append(
            [(r["metric"], r["ratio"], r["groups"], r["pruned"]["accuracy"]) for r in found]
        )
    assert rows[0] == rows[1]


@pytest.mark.skipif(bool(find_spec("ray")), reason="Ray is installed")
def test_several_workers_without_ray_name_the_extra(invoke: Invoke, grid: Path) -> None:
    result = invoke("sweep", grid, "--workers=2", "--out", grid.parent / "out")
    assert result.exit_code == 1 and "depgraph-prune[cluster]" in result.stderr


def test_a_dry_run_lists_the_runs_and_writes_nothing(invoke: Invoke, tmp_path: Path) -> None:
    text = GRID.replace('targets = ["outline"]', "seeds = [0, 1]") + 'scope = ["global", "uniform"]'
    out = tmp_path / "out"
    plan = invoke("sweep", written(tmp_path, text), "--dry-run", "--out", out, "--json")
    summary = json.loads(plan.stdout)
    assert summary["dense_models"] == 8 and len(summary["runs"]) == 64
    assert len({row["name"] for row in summary["runs"]}) == 64
    assert all(row["state"] == "to do" for row in summary["runs"]) and not out.exists()


def test_a_file_that_begins_with_a_byte_order_mark_is_read(invoke: Invoke, tmp_path: Path) -> None:
    grid = written(tmp_path, "\ufeff" + GRID)  # as editors on Windows write it
    assert invoke("sweep", grid, "--dry-run", "--out", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("rations = [0.5]", "'ratios'"),
        ('metrics = ["hesian"]', "'hessian'"),
        ('controls = ["dens"]', "'dense'"),
        ("epochs = -1", "epochs"),
        ("compensate = 3", "true or false"),
        ('models = [{name = "vit", wights = "x"}]', "'weights'"),
        ('targets = ["sketch"]', "sketch"),
        ('models = ["vti"]', "'vit'"),
        ('models = [{name = "vit", img_size = 64}]', "img_size"),
        ("ratios = []", "empty"),
        ("ratio = 0.5", "twice"),
        ("seeds = [", "TOML"),
        ("seeds = [1979-05-27]", "seed has 1979-05-27"),
        ('ratios = ["half"]', "ratio is 'half'; it must be a number"),
        ("ratios = [[0.5]]", "ratio is [0.5]; it must be a number"),
        ('models = [{name = "vit", label = 3}]', "label 3"),
        ("models = []", "models is empty"),
        ('data = ""', "data is empty"),
        ("ray = {num_cpus = 'two'}", "num_cpus"),
        ("dense = 'gone'", "'gone' is no directory"),
    ],
)
def test_a_bad_file_is_refused_with_the_way_out(
    invoke: Invoke, tmp_path: Path, line: str, words: str
) -> None:
    key = line.partition(" ")[0]
    kept = [row for row in GRID.splitlines() if not row.startswith(f"{key} ")]
    grid = written(tmp_path, "\n".join([*kept, line]))
    result = invoke("sweep", grid, "--dry-run", "--out", tmp_path / "out")
    assert result.exit_code in (1, 2) and words in result.stderr, result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("name", "runs", "dense"), [("pacs", 540, 36), ("office_home", 540, 36), ("ablation", None, 12)]
)
def test_the_files_that_come_with_the_project_ask_for_whole_grids(
    invoke: Invoke, data: Path, name: str, runs: int | None, dense: int
) -> None:
    shutil.copytree(data / "ink", data / "tar")  # four domains, as all of these have
    file = ROOT / "benchmarks" / "sweeps" / f"{name}.toml"
    other = [] if name == "ablation" else ["--data", data]
    plan = json.loads(invoke("sweep", file, *other, "--dry-run", "--json").stdout)
    cells = 3 * 4 * (3 * (len(METRICS) + 1) + 1)  # metrics and reinit at 3 budgets; and dense
    assert len(plan["runs"]) == (runs or cells) and plan["dense_models"] == dense
