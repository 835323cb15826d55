"""What is in a place already: overwritten only where this tool made it, or with ``--force``."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch

import depgraph
from tests.cli.conftest import TINY, Invoke
from tests.cli.test_report import result, write
from tests.cli.test_sweep import GRID, ROOT, written


@pytest.fixture
def small(invoke: Invoke, tmp_path: Path) -> Path:
    invoke("prune", *TINY, "--metric=l2", "--out", tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def run(data: Path, tmp_path: Path) -> list[object]:
    words = ["run", *TINY, "--data", data, "--target=wool", "--out", tmp_path / "run"]
    quick = ["--epochs=1", "--dense-epochs=0", "--batch-size=6", "--bench-seconds=0"]
    return [*words, *quick, "--metric=l2", "--no-compensate"]


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    """All that is below a directory, with its time and content."""
    return {
        str(path.relative_to(root)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(root.rglob("*"))
    }


def refused(invoke: Invoke, place: Path, *args: object) -> None:
    """Refused in one sentence that names the way out, with nothing changed; done with --force."""
    before = snapshot(place)
    answer = invoke(*args)
    assert answer.exit_code == 1 and "--force" in answer.stderr, answer.output
    assert "Traceback" not in answer.output and snapshot(place) == before
    again = invoke(*args, "--force")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "plan.json", "prune.json", "m.safetensors"]
)
def test_a_model_is_not_saved_among_files_of_others(
    invoke: Invoke, tmp_path: Path, name: str
) -> None:
    place = tmp_path / "theirs"
    place.mkdir()
    (place / name).write_text('{"hidden_size": 768}')
    refused(invoke, place, "prune", *TINY, "--metric=l2", "--out", place)


def test_shards_of_others_are_not_mixed_with_a_model(invoke: Invoke, tmp_path: Path) -> None:
    place = tmp_path / "theirs"
    place.mkdir()
    (place / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    refused(invoke, place, "prune", *TINY, "--metric=l2", "--out", place)
    depgraph.load(place)


def test_a_model_of_this_tool_is_replaced_and_what_is_beside_it_stays(
    invoke: Invoke, small: Path
) -> None:
    (small / "notes.txt").write_text("precious")
    assert invoke("prune", *TINY, "--metric=l1", "--out", small).exit_code == 0
    assert json.loads((small / "prune.json").read_text())["metric"] == "l1"
    assert (small / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["finetune.json", "training/checkpoint.pt"])
def test_training_does_not_replace_files_of_others(
    invoke: Invoke, small: Path, data: Path, name: str
) -> None:
    (small / name).parent.mkdir(exist_ok=True)
    torch.save({"theirs": 1}, small / name)
    args = ["finetune", small, "--data", data, "--target=wool", "--epochs=1", "--batch-size=6"]
    refused(invoke, small, *args)


@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_an_export_replaces_its_own_file_and_no_other(
    invoke: Invoke, small: Path, form: str
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxscript")
    args = ["export", small, f"--format={form}", "--no-check"]
    (small / f"model.{form}").write_bytes(b"theirs")
    refused(invoke, small, *args)
    again = invoke(*args)
    assert again.exit_code == 0, again.output


def test_pages_and_tables_replace_their_own_and_no_others(
    invoke: Invoke, tmp_path: Path, data: Path
) -> None:
    place = tmp_path / "pages"
    place.mkdir()
    study = write(tmp_path / "study", result("ink"))
    calls: dict[str, list[object]] = {
        "graph.graphml": ["inspect", *TINY, "--graphml", place / "graph.graphml"],
        "page.html": ["inspect", *TINY, "--html", place / "page.html"],
        "sheet.png": ["data", "check", data, "--sheet", place / "sheet.png"],
    }
    for name in ("report.html", "report.md", "table.csv", "runs.csv", "tables.tex"):
        calls[name] = ["report", study, "--out", place]
    for name, call in calls.items():
        (place / name).write_text("theirs")
        refused(invoke, place, *call)
        again = invoke(*call)
        assert again.exit_code == 0, again.output


def test_a_run_is_not_begun_among_files_of_others_by_resuming_it(
    invoke: Invoke, run: list[object], tmp_path: Path
) -> None:
    theirs = tmp_path / "run" / "dense"
    theirs.mkdir(parents=True)
    (theirs / "model.safetensors").write_bytes(b"theirs")
    refused(invoke, tmp_path / "run", *run, "--resume")


def test_a_run_begun_anew_by_force_is_another_run(
    invoke: Invoke, run: list[object], tmp_path: Path
) -> None:
    assert invoke(*run).exit_code == 0
    (tmp_path / "run" / "pruned" / "notes.txt").write_text("precious")
    refused(invoke, tmp_path / "run", *run, "--seed=3")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["seed"] == 3
    assert json.loads((tmp_path / "run" / "pruned.json").read_text())["made_with"]["seed"] == 3
    assert (tmp_path / "run" / "pruned" / "notes.txt").read_text() == "precious"


def test_resuming_a_finished_run_changes_nothing(
    invoke: Invoke, run: list[object], tmp_path: Path
) -> None:
    first = invoke(*run, "--json")
    before = snapshot(tmp_path / "run")
    again = invoke(*run, "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert snapshot(tmp_path / "run") == before
    assert json.loads(again.stdout) == json.loads(first.stdout)


def test_resuming_a_finished_training_changes_nothing(
    invoke: Invoke, small: Path, data: Path
) -> None:
    args = ["finetune", small, "--data", data, "--target=wool", "--epochs=2", "--batch-size=6"]
    first = invoke(*args, "--json")
    assert first.exit_code == 0, first.output
    before = snapshot(small)
    again = invoke(*args, "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert snapshot(small) == before
    assert json.loads(again.stdout) == json.loads(first.stdout)


def test_resuming_a_finished_cut_of_shards_changes_nothing(invoke: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "small"
    depgraph.save(timm.create_model("vit_tiny_patch16_224", depth=1), tmp_path / "dense")
    args = ["prune", "--checkpoint", tmp_path / "dense", "--out", out, "--resume"]
    assert invoke(*args).exit_code == 0
    before = snapshot(out)
    again = invoke(*args, "--json")
    assert again.exit_code == 0, again.output
    assert snapshot(out) == before
    assert json.loads(again.stdout) == json.loads((out / "prune.json").read_text())
    assert invoke(*args, "--ratio=0.25").exit_code == 0
    assert snapshot(out) != before


def test_files_have_the_modes_that_the_umask_gives(
    invoke: Invoke, run: list[object], data: Path, tmp_path: Path, open_umask: None
) -> None:
    out = tmp_path / "run"
    assert invoke(*run).exit_code == 0
    train = ["finetune", out / "pruned", "--data", data, "--target=wool", "--epochs=1"]
    assert invoke(*train, "--batch-size=6", "--out", out / "more").exit_code == 0
    calls: list[list[object]] = [
        ["export", out, "--format=pt2", "--no-check"],
        ["push-to-hub", out, "me/half", "--local-dir", out / "hub"],
        ["inspect", *TINY, "--graphml", out / "g.graphml", "--html", out / "g.html"],
        ["report", out],
        ["data", "check", data, "--sheet", out / "sheet.png"],
    ]
    for call in calls:
        answer = invoke(*call)
        assert answer.exit_code == 0, answer.output
    modes = {
        str(path.relative_to(tmp_path)): oct(stat.S_IMODE(path.stat().st_mode))
        for path in out.rglob("*")
        if stat.S_IMODE(path.stat().st_mode) != (0o750 if path.is_dir() else 0o640)
    }
    assert modes == {}
    assert len(list(out.rglob("*.safetensors"))) >= 5


def test_a_run_that_is_done_and_has_no_readable_result_is_done_again(
    invoke: Invoke, tmp_path: Path
) -> None:
    text = GRID.replace("[0.5, 0.75]", "0.5").replace('["l2", "random"]', '"l2"')
    grid, out = written(tmp_path, text), tmp_path / "out"
    assert invoke("sweep", grid, "--out", out).exit_code == 0
    (path,) = out.glob("*/result.json")
    mine = path.parent / "mine"
    mine.mkdir()
    path.write_text('{"model": "vit", "dense"')
    plan = invoke("sweep", grid, "--out", out, "--dry-run", "--json")
    assert json.loads(plan.stdout)["runs"][0]["state"] == "to do"
    again = invoke("sweep", grid, "--out", out)
    assert again.exit_code == 0, again.output
    assert json.loads(path.read_text())["metric"] == "l2"
    assert mine.is_dir()


def test_a_sweep_does_not_work_in_directories_of_others(invoke: Invoke, tmp_path: Path) -> None:
    text = GRID.replace("[0.5, 0.75]", "0.5").replace('["l2", "random"]', '"l2"')
    grid, out = written(tmp_path, text), tmp_path / "out"
    plan = json.loads(invoke("sweep", grid, "--out", out, "--dry-run", "--json").stdout)
    theirs = out / plan["runs"][0]["name"]
    theirs.mkdir(parents=True)
    (theirs / "result.json").write_text("{}")
    answer = invoke("sweep", grid, "--out", out)
    assert answer.exit_code == 1 and "--force" in answer.stderr
    assert (theirs / "result.json").read_text() == "{}"


def test_sweeps_that_are_started_together_share_the_work(tmp_path: Path) -> None:
    grid, out = written(tmp_path), tmp_path / "new" / "out"
    call = [sys.executable, "-m", "cli.main", "sweep", str(grid), "--out", str(out), "--json"]
    began = [
        subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in began:
        answer, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert json.loads(answer)["done"] == 4
    (dense,) = (out / "dense").glob("*/log.txt")
    assert dense.read_text().count(" dense ...") == 1
    logs = [path.read_text() for path in out.glob("*/log.txt")]
    assert [text.count("pruned-only ...") for text in logs] == [1] * 4
