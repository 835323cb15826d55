from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from depgraph import DepgraphError
from domains._device import accelerator
from domains._loading import TrainOrder
from tests.domains.conftest import MakeTree
from tests.domains.shared_training import VARIANTS, train_all


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


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(make_tree: MakeTree, tmp_path: Path) -> None:
    root = make_tree()
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    train_all(root, one)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launch += ["--standalone", "-m", "tests.domains.shared_training", root, two]
    done = subprocess.run(map(str, launch), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in VARIANTS:
        alone, shared = (torch.load(p / f"{name}.pt", weights_only=True) for p in (one, two))
        for key, weight in alone.items():
            torch.testing.assert_close(shared[key], weight, rtol=1e-3, atol=1e-5)
        rows = [json.loads((p / f"{name}.json").read_text()) for p in (one, two)]
        assert rows[0]["accuracy"] == rows[1]["accuracy"]
        for row, other in zip(rows[0]["history"], rows[1]["history"], strict=True):
            for value in ("train_loss", "val_loss", "val_accuracy"):
                assert other[value] == pytest.approx(row[value], rel=1e-4)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
