from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from depgraph import DepgraphError
from domains import leave_one_out, load_domains
from domains.data.loading import TrainOrder
from domains.running.device import accelerator
from tests.domains.conftest import MakeTree
from tests.domains.shared_training import VARIANTS, train, train_all


def test_processes_share_the_very_batches_of_one_with_equal_domains() -> None:
    pools = [range(10), range(10, 23)]
    whole = list(TrainOrder(pools, 8, seed=3))
    parts = [list(TrainOrder(pools, 8, seed=3, shard=(place, 2))) for place in (0, 1)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(draw for share in shares for draw in share)
        for share in shares:
            assert sum(index < 10 for index, _ in share) == 2


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(DepgraphError, match="batch_size 9 cannot be shared by 2 processes"):
        TrainOrder([range(10)], 9, seed=0, shard=(0, 2))


def test_accelerate_that_starts_one_process_of_several_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(DepgraphError, match="one process only on the CPU"):
        accelerator("cpu", amp=False)


FSDP = {
    "ACCELERATE_USE_FSDP": "true",  # what accelerate's launcher sets
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
}


def two_processes(module: str, *args: Path | str, **environment: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launch += ["--standalone", "-m", f"tests.domains.{module}", *map(str, args)]
    done = subprocess.run(
        launch, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_give_the_result_of_one_each_whole_or_in_shards(
    make_tree: MakeTree, tmp_path: Path
) -> None:
    root = make_tree()
    one, whole, shards = (tmp_path / name for name in ("one", "whole", "shards"))
    for folder in (one, whole, shards):
        folder.mkdir()
    train_all(root, one)
    two_processes("shared_training", root, whole)
    two_processes("shared_training", root, shards, **FSDP)
    for two in (whole, shards):
        for name in VARIANTS:
            _assert_alike(one, two, name)
        assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())


def _assert_alike(one: Path, two: Path, name: str) -> None:
    # bfloat16 rounds parts of a batch otherwise than the batch: 8 bits of mantissa.
    loose = {"rtol": 2e-2, "atol": 2e-3} if name == "half" else {"rtol": 1e-3, "atol": 1e-5}
    alone, shared = (torch.load(p / f"{name}.pt", weights_only=True) for p in (one, two))
    for key, weight in alone.items():
        torch.testing.assert_close(shared[key], weight, **loose, msg=lambda m: f"{two} {name} {m}")
    rows = [json.loads((p / f"{name}.json").read_text()) for p in (one, two)]
    if name != "half":
        assert rows[0]["accuracy"] == rows[1]["accuracy"]
    for row, other in zip(rows[0]["history"], rows[1]["history"], strict=True):
        for value in ("train_loss", "val_loss", "val_accuracy"):
            if name != "half" or value != "val_accuracy":
                near = 1e-2 if name == "half" else 1e-4
                assert other[value] == pytest.approx(row[value], rel=near)


@pytest.mark.slow
def test_shards_are_parts_that_resume_and_what_cannot_be_shared_is_refused(
    make_tree: MakeTree, tmp_path: Path
) -> None:
    two_processes("shared_shards", make_tree(), tmp_path, **FSDP)


@pytest.mark.slow
def test_one_process_goes_on_from_a_checkpoint_of_shards(
    make_tree: MakeTree, tmp_path: Path
) -> None:
    root = make_tree()
    two_processes("shared_shards", root, tmp_path, "stop", **FSDP)
    split = leave_one_out(load_domains(root), "photo", seed=1)
    for name in ("swad", "distilled"):
        alone, _ = train(name, split, tmp_path / f"{name}-alone")
        resumed, _ = train(name, split, tmp_path / f"{name}-stopped", resume=True)
        for key, weight in alone.state_dict().items():
            torch.testing.assert_close(resumed.state_dict()[key], weight, rtol=1e-3, atol=1e-5)
