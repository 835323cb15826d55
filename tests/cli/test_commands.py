from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import timm
import torch
from safetensors.torch import save_file

import depgraph
from domains.measuring import op_timing
from tests.cli.conftest import TINY, Invoke

QUICK = ["--epochs=1", "--dense-epochs=1", "--batch-size=6", "--bench-seconds=0.1"]


def test_inspect_lists_groups_and_writes_graphml_and_a_page(invoke: Invoke, tmp_path: Path) -> None:
    graphml, page = tmp_path / "graph.graphml", tmp_path / "groups.html"
    result = invoke("inspect", *TINY, "--json", "--graphml", graphml, "--html", page)
    assert result.exit_code == 0, result.output
    groups = {group["name"]: group for group in json.loads(result.stdout)["groups"]}
    assert groups["blocks.0.attn.heads"]["size"] == 4
    assert any("output" in (group["frozen"] or "") for group in groups.values())
    assert "group:embed" in nx.read_graphml(graphml)
    assert "blocks.1.mlp.hidden" in page.read_text()


def test_inspect_needs_no_weights(invoke: Invoke) -> None:
    result = invoke("inspect", "vit_large_patch16_224", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["prunable"] == 1 + 3 * 24


def test_prune_saves_a_model_that_loads(invoke: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "small"
    args = ["--ratio=0.5", "--metric=l2", "--num-classes=3", "--out", out, "--json"]
    result = invoke("prune", *TINY, *args)
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    model = depgraph.load(out)
    assert row["pruned"]["params"] == sum(p.numel() for p in model.parameters())
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    units = row["groups"].values()
    removed = sum(group["size"] - group["kept"] for group in units)
    assert removed == round(0.5 * sum(group["size"] for group in units))


def test_a_target_of_macs_is_met(invoke: Invoke, tmp_path: Path) -> None:
    args = ["--target-macs=0.4", "--metric=l1", "--out", tmp_path / "small", "--json"]
    row = json.loads(invoke("prune", *TINY, *args).stdout)
    assert row["pruned"]["macs"] == pytest.approx(0.4 * row["dense"]["macs"], rel=0.02)


def test_a_target_of_latency_is_met_by_the_table_of_the_device(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_size(jobs: Any, *args: Any, **kwargs: Any) -> dict[Any, float]:
        return {job: 1e-3 + 1e-5 * math.prod(job[2]) for job in jobs}

    monkeypatch.setattr(op_timing, "time_ops", by_size)  # a clock that is the same everywhere
    table = tmp_path / "table.json"
    args = ["--target-latency=0.6", "--metric=l1", "--out", tmp_path / "small", "--json"]
    result = invoke("prune", *TINY, *args, "--latency-table", table, "--device=cpu")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert row["pruned"]["macs"] < row["dense"]["macs"]
    assert row["predicted_latency_kept"] == pytest.approx(0.6, rel=0.02)
    assert json.loads(table.read_text())["device"]["dtype"] == "float32"


def test_run_does_the_whole_job_and_resumes_to_the_same_result(
    invoke: Invoke, data: Path, tmp_path: Path
) -> None:
    args = ["run", *TINY, "--data", data, "--target=wool", *QUICK, "--json"]
    args += ["--ratio=0.5", "--out", tmp_path / "run"]
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert row["target_domain"] == "wool" and row["metric"] == "obs" and row["ratio"] == 0.5
    for model in ("dense", "pruned"):
        assert set(row[model]["accuracy"]) == {"clay", "ink", "wool"}
        assert {"params", "macs", "latency_ms"} <= set(row[model])
    assert row["pruned"]["macs"] < row["dense"]["macs"] and row["speedup"] > 0
    assert row["seed"] == 0 and row["versions"]["torch"] == torch.__version__
    page = (tmp_path / "run" / "report.html").read_text()
    assert "wool" in page and not re.search(r"(src|href)=.?(http|//)", page)

    assert "--resume" in invoke(*args).stderr
    (tmp_path / "run" / "result.json").unlink()
    again = json.loads(invoke(*args, "--resume").stdout)
    assert again["pruned"]["accuracy"] == row["pruned"]["accuracy"]
    other = invoke(*args, "--resume", "--ratio=0.75")
    assert other.exit_code == 1 and "was made with ratio=0.5" in other.stderr


def test_a_saved_model_is_finetuned_evaluated_and_timed(
    invoke: Invoke, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    invoke("prune", *TINY, "--metric=taylor", "--data", data, "--target=ink", "--out", out)
    args = ["--data", data, "--target=ink", "--json"]
    tuned = invoke("finetune", out, *args, "--epochs=1", "--batch-size=6")
    assert tuned.exit_code == 0, tuned.output
    measured = invoke("evaluate", out, *args, "--bench-seconds=0.1")
    accuracy = json.loads(measured.stdout)["accuracy"]
    assert accuracy == json.loads(tuned.stdout)["accuracy"]
    dense = timm.create_model(
        TINY[0], img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=4, num_classes=2
    )
    depgraph.save(dense, tmp_path / "dense")
    timed = invoke("bench", out, "--seconds=0.1", "--json")
    assert timed.exit_code == 0, timed.output
    row = json.loads(timed.stdout)
    assert row["dense"]["macs"] > row["pruned"]["macs"]
    both = json.loads(invoke("evaluate", out, *args, "--bench-seconds=0.1").stdout)
    assert both["metric"] == "taylor" and both["ratio"] == 0.5 and both["target_domain"] == "ink"
    assert both["speedup"] > 0 and set(both["dense"]["accuracy"]) == {"clay", "ink", "wool"}
    assert both["dense"]["params"] > both["pruned"]["params"]


def test_an_algorithm_is_chosen_by_name_and_written_into_the_result(
    invoke: Invoke, data: Path, tmp_path: Path
) -> None:
    args = ["run", *TINY, "--data", data, "--target=wool", *QUICK, "--json", "--metric=l2"]
    args += ["--algorithm=coral", "--algorithm-arg=penalty=0.5", "--out", tmp_path / "run"]
    row = json.loads(invoke(*args).stdout)
    assert row["algorithm"] == "coral" and row["recipe"] == "looks"
    for training in ("dense", "recovery"):
        assert row["settings"][training]["algorithm_args"] == {"penalty": 0.5}
    args = ["finetune", tmp_path / "run", "--data", data, "--target=wool", "--epochs=1"]
    args += ["--batch-size=6", "--json", "--out", tmp_path / "tuned"]
    row = json.loads(invoke(*args, "--algorithm=swad").stdout)
    assert row["algorithm"] == "swad"
    assert "did you mean 'swad'" in invoke(*args, "--algorithm=swat").stderr
    assert "needs --algorithm" in invoke(*args, "--algorithm-arg=penalty=1").stderr
    assert "--teacher" in invoke(*args, "--recipe=distill").stderr


@pytest.mark.parametrize("schedule", ["iterative", "regularised", "soft"])
def test_a_schedule_ends_at_the_budget_and_resumes_to_the_same_result(
    invoke: Invoke, data: Path, tmp_path: Path, schedule: str
) -> None:
    args = ["run", *TINY, "--data", data, "--target=wool", *QUICK, "--json", "--metric=l2"]
    args += ["--target-macs=0.5", "--schedule", schedule, "--step-epochs=2"]
    args += ["--steps=2"] if schedule == "iterative" else []
    whole = invoke(*args, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    middle = "cut-1" if schedule == "iterative" else "dense"
    out = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", out)
    for path in out.iterdir():  # as if it was stopped after one stage
        if path.is_dir() and path.name not in ("dense", middle):
            shutil.rmtree(path)
        elif path.is_file() and path.stem not in ("dense", middle):
            path.unlink()
    first, again = (
        json.loads(result.stdout) for result in (whole, invoke(*args, "--resume", "--out", out))
    )
    assert first["schedule"] == schedule
    assert first["pruned"]["macs"] == pytest.approx(0.5 * first["dense"]["macs"], rel=0.03)
    assert first["pruned"]["accuracy"] == again["pruned"]["accuracy"]
    assert first["groups"] == again["groups"]
    assert len(first["history"]) == 3


def test_options_of_a_schedule_need_it(invoke: Invoke, data: Path, tmp_path: Path) -> None:
    args = ["run", *TINY, "--data", data, "--target=wool", "--out", tmp_path / "run"]
    for option in ("--steps=2", "--step-epochs=1"):
        result = invoke(*args, option)
        assert result.exit_code == 2 and "--schedule" in result.stderr


def test_weights_of_another_size_and_without_a_head_are_taken(
    invoke: Invoke, tmp_path: Path
) -> None:
    bigger = timm.create_model(
        TINY[0], img_size=64, patch_size=8, depth=2, embed_dim=32, num_heads=4, num_classes=0
    )
    save_file(bigger.half().state_dict(), tmp_path / "w.safetensors")
    args = ["--weights", tmp_path / "w.safetensors", "--metric=l2", "--num-classes=3"]
    result = invoke("prune", *TINY, *args, "--out", tmp_path / "small")
    assert result.exit_code == 0, result.output
    assert "head.weight" in result.stderr and "random" in result.stderr


def test_demo_ends_with_a_table_and_the_path_of_the_report(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("demo", "--quick", "--model=beit", "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    path = result.stdout.strip().splitlines()[-1].removeprefix("report: ")
    assert Path(path).read_text().startswith("<!doctype html>")
    assert "outline (unseen)" in result.stdout


def test_a_checkpoint_is_pruned_shard_by_shard(invoke: Invoke, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    depgraph.save(model, tmp_path / "dense")
    call = ["prune", "--checkpoint", str(tmp_path / "dense"), "--img-size", "32", "--ratio", "0.5"]
    result = invoke(*call, "--max-memory", "16GiB", "--out", tmp_path / "small", "--json")
    assert result.exit_code == 0, result.output
    small = depgraph.load(tmp_path / "small")
    params = sum(p.numel() for p in small.parameters())
    assert json.loads(result.stdout)["pruned"]["params"] == params
    assert small(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_what_was_pruned_on_disk_is_finetuned_like_any_other(
    invoke: Invoke, data: Path, tmp_path: Path
) -> None:
    dense = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=2)
    depgraph.save(dense, tmp_path / "dense")
    out = tmp_path / "small"
    call = ["prune", "--checkpoint", tmp_path / "dense", "--img-size", "32", "--out", out]
    assert invoke(*call).exit_code == 0
    tuned = invoke(
        *[
            "finetune",
            out,
            "--data",
            data,
            "--target=wool",
            "--epochs=1",
            "--batch-size=6",
            "--json",
        ]
    )
    assert tuned.exit_code == 0, tuned.output
    assert set(json.loads(tuned.stdout)["accuracy"]) == {"clay", "ink", "wool"}


def test_a_checkpoint_in_timms_form_says_which_model_it_is_of(
    invoke: Invoke, tmp_path: Path
) -> None:
    arguments = {"img_size": 32, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": arguments}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    result = invoke("prune", "--checkpoint", tmp_path, "--out", tmp_path / "small")
    assert result.exit_code == 0, result.output
    assert depgraph.load(tmp_path / "small")(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("metric", ["obs", "wanda"])
def test_a_folder_of_images_without_labels_is_enough_to_compensate(
    invoke: Invoke, data: Path, tmp_path: Path, metric: str
) -> None:
    call = ["prune", *TINY, "--num-classes=2", "--ratio=0.5", f"--metric={metric}", "--json"]
    result = invoke(*call, "--calibration", data / "clay", "--out", tmp_path / "small")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert row["compensated"] and row["calibration"] == str(data / "clay")
    assert depgraph.load(tmp_path / "small")


def test_labels_are_not_taken_from_a_folder_without(
    invoke: Invoke, data: Path, tmp_path: Path
) -> None:
    call = ["prune", *TINY, "--num-classes=2", "--ratio=0.5", "--metric=taylor"]
    result = invoke(*call, "--calibration", data / "clay", "--out", tmp_path / "small")
    assert result.exit_code == 1
    assert "--data" in result.stderr
    result = invoke(*call, "--calibration", tmp_path / "gone", "--out", tmp_path / "small")
    assert result.exit_code == 2


def test_what_is_fitted_to_looks_is_another_model(
    invoke: Invoke, data: Path, tmp_path: Path
) -> None:
    weights = []
    for how in ("plain", "styles", "styles"):
        call = ["prune", *TINY, "--ratio=0.5", "--data", data, "--target=ink", "--seed=1"]
        out = tmp_path / f"{how}{len(weights)}"
        result = invoke(*call, f"--calibration={how}", "--num-calibration=16", "--out", out)
        assert result.exit_code == 0, result.output
        weights.append(depgraph.load(out).state_dict())
    plain, styles, again = weights
    assert all(torch.equal(styles[name], again[name]) for name in styles)
    assert any(plain[name].shape != styles[name].shape or not torch.equal(plain[name], styles[name])
               for name in plain)  # fmt: skip


def test_a_preset_gives_way_to_what_is_said(invoke: Invoke, data: Path, tmp_path: Path) -> None:
    call = ["prune", *TINY, "--target-macs=0.8", "--data", data, "--preset=vbp", "--json"]
    row = json.loads(invoke(*call, "--out", tmp_path / "one").stdout)
    assert row["metric"] == "variance" and row["compensated"]
    groups = {g.name: g.kind for g in depgraph.trace(*_dense_and_example()).groups}
    cut = {groups[name] for name, sizes in row["groups"].items() if sizes["kept"] < sizes["size"]}
    assert cut == {"hidden"}
    row = json.loads(invoke(*call, "--metric=l1", "--out", tmp_path / "two").stdout)
    assert row["metric"] == "l1"


def _dense_and_example() -> tuple[torch.nn.Module, torch.Tensor]:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=4
    )
    return model, torch.zeros(1, 3, 32, 32)
