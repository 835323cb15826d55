from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Invoke

PACS = ("art_painting", "cartoon", "photo", "sketch")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def result(
    target: str,
    seed: int = 0,
    *,
    metric: str = "l2",
    model: str = "vit_tiny_patch16_224",
    ratio: float | None = 0.5,
    pruned: float = 0.6,
    domains: tuple[str, ...] = ("ink", "wool"),
    **settings: Any,
) -> dict[str, Any]:
    """A row as `run` writes it: dense 80% on the sources and 70% on the unseen domain."""

    def side(source: float, unseen: float, size: int) -> dict[str, Any]:
        return {
            "accuracy": {name: unseen if name == target else source for name in domains},
            "source_accuracy": source,
            "target_accuracy": unseen,
            "params": 1_000_000 * size,
            "macs": 20_000_000 * size,
            "latency_ms": 2.0 * size,
        }

    return {
        "model": model,
        "metric": metric,
        "ratio": ratio,
        "target": None,
        "target_domain": target,
        "seed": seed,
        "dense": side(0.8, 0.7, 4),
        "pruned_only": {"source_accuracy": 0.3, "target_accuracy": 0.2},
        "pruned": side(0.75, pruned, 1),
        "speedup": 4.0,
        "groups": [{"name": "blocks.0.attn.heads", "kind": "heads", "size": 4, "kept": 1}],
        "scores": {"heads": {"log10": [0.0, 1.0, 2.0], "kept": [0, 1], "removed": [3, 0]}},
        "history": {"dense": [], "pruned": [{"epoch": 1, "val_accuracy": 0.75}]},
        "seconds": {"pruned": 12.0},
        "settings": {"model": model, "seed": seed, "pruning": {"metric": metric}, **settings},
    }


def write(root: Path, *rows: dict[str, Any]) -> Path:
    for row in rows:
        out = root / f"run{sum(1 for _ in root.glob('run*'))}"
        out.mkdir(parents=True)
        (out / "result.json").write_text(json.dumps(row))
    return root


def table(invoke: Invoke, root: Path) -> list[dict[str, Any]]:
    answer = invoke("report", root, "--json")
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)["table"]


def test_means_are_over_unseen_domains_and_errors_over_seeds(
    invoke: Invoke, tmp_path: Path
) -> None:
    shares = {("ink", 0): 0.6, ("wool", 0): 0.5, ("ink", 1): 0.64, ("wool", 1): 0.54}
    root = write(tmp_path, *(result(t, s, pruned=share) for (t, s), share in shares.items()))
    (line,) = table(invoke, root)
    assert line["runs"] == 4 and line["seeds"] == 2 and line["budget"] == ["ratio", 0.5]
    assert line["unseen"] == pytest.approx([57, 2])  # 55 and 59
    assert line["unseen_drop"] == pytest.approx([-13, 2])
    assert line["source_drop"] == pytest.approx([-5, 0])
    assert line["macs_share"][0] == 25 and line["speedup"][0] == 4


def test_results_that_differ_in_a_setting_are_not_averaged_together(
    invoke: Invoke, tmp_path: Path
) -> None:
    rows = [result("ink", pruned=0.6, scope="global"), result("ink", pruned=0.4, scope="uniform")]
    lines = table(invoke, write(tmp_path, *rows))
    assert {line["variant"]: line["unseen"][0] for line in lines} == pytest.approx(
        {"scope=global": 60, "scope=uniform": 40}
    )


def test_the_papers_figures_stand_beside_pacs_results_of_its_models_alone(
    invoke: Invoke, tmp_path: Path
) -> None:
    base, hessian = "deit_base_patch16_224", {"metric": "hessian"}
    ours = write(tmp_path / "a", result("sketch", model=base, domains=PACS, **hessian))
    others = write(
        tmp_path / "b",
        result("ink", model=base, **hessian),
        result("sketch", domains=PACS, **hessian),
        result("sketch", model=base, domains=PACS, metric="l2"),
        result("sketch", model=base, domains=PACS, ratio=0.75, **hessian),
    )
    for root in (ours, others):
        assert invoke("report", root).exit_code == 0
    for name in ("report.md", "report.html", "tables.tex"):
        text = (ours / "report" / name).read_text().replace("−", "-")
        assert "1.72" in text and "2.15" in text and "Riaz and Smeaton 2025" in text
        assert "Riaz" not in (others / "report" / name).read_text()


def test_a_study_is_written_for_people_papers_and_programs(invoke: Invoke, tmp_path: Path) -> None:
    rows = [result(t, metric=m) for t in ("ink", "wool") for m in ("l2", "random")]
    write(tmp_path / "study", *rows, result("ink", metric="dense", ratio=None))
    failed = tmp_path / "study" / "vit-obs-1"
    failed.mkdir()
    (failed / "error.txt").write_text("the disk was full\n\nTraceback")
    (tmp_path / "study" / "begun").mkdir()
    (tmp_path / "study" / "begun" / "config.json").write_text("{}")
    answer = invoke("report", tmp_path / "study", "--out", tmp_path / "out")
    assert answer.exit_code == 0, answer.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"(src|href)=.?(http|//)", page) and "the disk was full" in page
    for says in (
        "against MMACs",
        "against latency",
        "unseen one",
        "Distribution of scores",
        "epochs",
    ):
        assert says in page
    assert "dense, trained on" in page and ">25<" in page
    with (tmp_path / "out" / "runs.csv").open() as file:
        assert [row["metric"] for row in csv.DictReader(file)].count("l2") == 2
    latex = (tmp_path / "out" / "tables.tex").read_text()
    assert r"vit\_tiny\_patch16\_224" in latex and r"\toprule" in latex
    assert "1 failed" in (tmp_path / "out" / "report.md").read_text()
    again = json.loads(invoke("report", tmp_path / "study", "--json").stdout)
    assert again["runs"] == 5 and again["unfinished"] == 1


def test_what_is_no_result_is_named_and_left_out(invoke: Invoke, tmp_path: Path) -> None:
    root = write(tmp_path, result("ink"))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "result.json").write_text('{"model": ')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text("[]")
    answer = invoke("report", root)
    assert answer.exit_code == 0
    assert answer.stderr.count("is left out") == 2 and "half" in answer.stderr


@pytest.mark.parametrize(
    "other",
    [
        {"dense": None},
        {"pruned": {}},
        {"speedup": "fast"},
        {"model": ["vit"]},
        {"settings": None},
        {"history": [1]},
        {"ratio": "half"},
        {"ratio": None, "target": [0.5]},
    ],
)
def test_a_result_with_values_of_another_kind_is_left_out(
    invoke: Invoke, tmp_path: Path, other: dict[str, Any]
) -> None:
    root = write(tmp_path, result("ink"), {**result("wool"), **other})
    (tmp_path / "error.txt").write_bytes(b"\xff")
    answer = invoke("report", root, "--json")
    assert answer.exit_code == 0, answer.output
    assert answer.stderr.count("is left out") == 1
    assert json.loads(answer.stdout)["runs"] == 1


def test_a_directory_without_results_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    answer = invoke("report", tmp_path)
    assert answer.exit_code == 1 and "no result below" in answer.stderr


@pytest.mark.slow
def test_the_page_of_500_runs_stays_below_a_megabyte(invoke: Invoke, tmp_path: Path) -> None:
    rows = [
        result(target, seed, metric=metric, model=model, ratio=ratio, domains=PACS)
        for target in PACS
        for seed in range(3)
        for metric in ("random", "l1", "l2", "taylor", "hessian")
        for model in ("vit", "beit", "deit")
        for ratio in (0.5, 0.75, 0.95)
    ]
    assert invoke("report", write(tmp_path, *rows)).exit_code == 0
    assert (tmp_path / "report" / "report.html").stat().st_size < 1e6


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_in_both_schemes(invoke: Invoke, tmp_path: Path, scheme: str) -> None:
    rows = [result(t, metric=m) for t in ("ink", "wool") for m in ("l2", "random", "hessian")]
    assert invoke("report", write(tmp_path, *rows)).exit_code == 0
    # The frame is as wide as a phone, which a window of a browser without a screen cannot be.
    probe = tmp_path / "probe.html"
    probe.write_text(
        '<iframe id="f" src="report/report.html" style="width: 400px; height: 800px; border: 0">'
        "</iframe><pre></pre><script>f.onload = () => { const d = f.contentDocument;"
        "document.querySelector('pre').textContent = JSON.stringify({"
        "width: d.documentElement.scrollWidth, plots: d.querySelectorAll('svg').length,"
        "paper: f.contentWindow.getComputedStyle(d.body).backgroundColor,"
        "tables: [...d.querySelectorAll('table')].every(t => t.closest('.wide'))}) }</script>"
    )
    call = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    call += ["--allow-file-access-from-files", "--virtual-time-budget=5000"]
    call += [f"--user-data-dir={tmp_path / 'browser'}", "--disable-dev-shm-usage"]
    call += ["--force-dark-mode"] if scheme == "dark" else []
    done = subprocess.run([*call, probe.as_uri()], capture_output=True, text=True, timeout=120)
    found = json.loads(re.findall(r"<pre>(.*?)</pre>", done.stdout)[0])
    assert found["width"] <= 400 and found["tables"] and found["plots"] >= 4
    brightness = sum(map(int, re.findall(r"\d+", found["paper"])[:3])) / 3
    assert brightness > 200 if scheme == "light" else brightness < 60


@pytest.mark.parametrize(
    "change",
    [
        {"groups": [{"kind": "heads", "size": 4, "kept": 1}]},
        {"history": {"pruned": [{"epoch": 1, "val_accuracy": "x"}]}},
        {"scores": {"heads": {"log10": [0.0], "kept": [0, 1], "removed": [3, 0]}}},
        {"seconds": {"pruned": []}},
        {"seed": {}},
        {"speedup": 0},
        {"speedup": 10**400},
        {"dense": {}},
        {"training": {"pruned": {"start": {"val_accuracy": None}}}},
    ],
)
def test_a_result_that_is_none_is_left_out_by_name(
    invoke: Invoke, tmp_path: Path, change: dict[str, Any]
) -> None:
    write(tmp_path, result("ink"), result("wool"), {**result("ink", 1), **change})
    answer = invoke("report", tmp_path)
    assert answer.exit_code == 0, answer.stderr
    assert "run2/result.json' is no result of a run" in answer.stderr.replace("\n", " ")


def test_only_files_of_the_folder_are_read(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "outside.json").write_text(json.dumps(result("wool", 5)))
    root = write(tmp_path / "root", result("ink"), result("wool"))
    for name in ("pipe", "link", "deep", "failed"):
        (root / name).mkdir()
    os.mkfifo(root / "pipe" / "result.json")  # reading it would wait for ever
    (root / "link" / "result.json").symlink_to(tmp_path / "outside.json")
    (root / "deep" / "result.json").write_text("[" * 100_000)
    (root / "failed" / "error.txt").symlink_to("/etc/hostname")
    answer = invoke("report", root, "--json")
    assert answer.exit_code == 0, answer.stderr
    assert answer.stderr.count("left out") == 3
    assert {row["seeds"] for row in json.loads(answer.stdout)["table"]} == {1}
