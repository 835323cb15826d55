"""What FSDP must do beside training as one process does; launched as two by `test_processes`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from depgraph import DepgraphError
from domains import Split, finetune, leave_one_out, load_domains
from domains.running import processes
from domains.running.device import accelerator, gathered
from domains.running.sharding import OPTIMIZERS, shard
from domains.training.epoch import EpochRunner
from domains.training.state import EpochRow, TrainState
from tests.domains.conftest import TinyNet
from tests.domains.shared_training import settings_of, small_model, train


class _Stop(Exception):
    pass


def _stopped(name: str, split: Split, folder: Path) -> None:
    """Train a variant until its second epoch, at which all processes stop."""
    whole_run = EpochRunner.run

    def run(self: EpochRunner, state: TrainState, epoch: int) -> EpochRow:
        if epoch == 1:
            raise _Stop
        return whole_run(self, state, epoch)

    with patch.object(EpochRunner, "run", run), suppress(_Stop):
        train(name, split, folder)
    processes.wait()


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


class _Crossed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.linear(images.mean((2, 3)), self.first.weight)


def _refusal(model: nn.Module) -> str:
    with pytest.raises(DepgraphError) as caught:
        shard(model, accelerator("cpu", amp=False))
    return str(caught.value)


def _same(one: nn.Module, two: nn.Module) -> bool:
    other: dict[str, Tensor] = two.state_dict()
    return all(torch.equal(value, other[name]) for name, value in one.state_dict().items())


def check_all(root: Path, out: Path) -> None:
    """Raise unless shards are parts, a resumed run is the same, and the rest is refused."""
    split = leave_one_out(load_domains(root), "photo", seed=1)
    local = shard(small_model(), accelerator("cpu", amp=False))
    for parameter in local.parameters():
        assert isinstance(parameter, DTensor)
    held = sum(p.to_local().numel() for p in local.parameters() if isinstance(p, DTensor))
    assert held < 0.6 * sum(p.numel() for p in small_model().parameters())
    for name in ("swad", "distilled", "layers"):
        whole, _ = train(name, split, out / f"{name}-whole")
        _stopped(name, split, out / f"{name}-again")
        again, _ = train(name, split, out / f"{name}-again", resume=True)
        assert _same(whole, again), name
    assert "Could not find the transformer layer class Block" in _refusal(TinyNet())
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "NO_WRAP"
    batch_normed = TinyNet()
    finetune(batch_normed, split, settings_of("erm"), out / "norm", progress=False)
    run = accelerator("cpu", amp=False)
    flat = torch.cat([v.flatten().double() for v in batch_normed.state_dict().values()])
    mine, others = gathered(run, flat).chunk(2)
    assert torch.equal(mine, others)
    for optimizer in OPTIMIZERS:
        settings = replace(settings_of("erm"), optimizer=optimizer, epochs=1)
        finetune(small_model(), split, settings, out / optimizer, progress=False)
    settings = replace(settings_of("erm"), optimizer="adafactor")
    with pytest.raises(DepgraphError, match="'adafactor' does not work on weights in shards"):
        finetune(small_model(), split, settings, out / "refused", progress=False)
    assert "Change scale to a 1D tensor" in _refusal(_Scaled())
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "5"}
    assert "'first.weight' and 'last.weight' are one" in _refusal(_Tied())
    with pytest.raises(DepgraphError, match="without calling it"):
        finetune(_Crossed(), split, settings_of("erm"), out / "crossed", progress=False)
    for name, value, said in (
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params is not supported"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing is not"),
        ("FSDP_VERSION", "1", "launch with --fsdp_version 2"),
    ):
        before = os.environ.get(name)
        os.environ[name] = value
        assert said in _refusal(small_model()), name
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def stop_all(root: Path, out: Path) -> None:
    """Leave checkpoints of trainings that were stopped half-way."""
    split = leave_one_out(load_domains(root), "photo", seed=1)
    for name in ("swad", "distilled"):
        _stopped(name, split, out / f"{name}-stopped")


if __name__ == "__main__":
    (stop_all if sys.argv[3:] == ["stop"] else check_all)(Path(sys.argv[1]), Path(sys.argv[2]))
