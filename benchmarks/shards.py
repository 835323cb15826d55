"""A checkpoint larger than the memory that it is pruned in, for `benchmarks.scale`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import psutil
import timm
import torch
from torch import Tensor

from depgraph.storing.checkpoint import INDEX, index_text, write_shard


def write_random_checkpoint(directory: Path, name: str, shards: int) -> int:
    """Write normal weights for a timm model, in shards, a piece at a time; returns their bytes."""
    with torch.device("meta"):
        model = timm.create_model(name)
    state = model.state_dict()
    files = {
        key: f"model-{i * shards // len(state):05d}.safetensors" for i, key in enumerate(state)
    }
    generator = torch.Generator().manual_seed(0)

    def pieces(key: str) -> Iterator[Tensor]:
        tensor = state[key]
        if not tensor.shape:
            yield torch.zeros((), dtype=tensor.dtype)
            return
        rows = max(1, (8 << 20) * len(tensor) // tensor.numel())
        for start in range(0, len(tensor), rows):
            shape = (min(rows, len(tensor) - start), *tensor.shape[1:])
            yield torch.randn(shape, generator=generator) * 0.02

    for file in sorted(set(files.values())):
        mine = {k: (tuple(t.shape), t.dtype) for k, t in state.items() if files[k] == file}
        write_shard(directory / file, mine, pieces)
    total = sum(t.nbytes for t in state.values())
    (directory / INDEX).write_text(index_text(files, total), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps({"architecture": name}))
    return total


class Watched:
    """A call of the command line whose memory is looked at while it runs."""

    def __init__(self, *arguments: str) -> None:
        self.curve: list[tuple[float, float]] = []
        command = [sys.executable, "-m", "cli.main", *arguments]
        self._start = time.perf_counter()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def wait(self, stop: Callable[[], bool] = lambda: False) -> int:
        """Wait for its end, or kill it once ``stop()``; the exit code."""
        process = psutil.Process(self._process.pid)
        while self._process.poll() is None:
            try:
                taken = process.memory_info().rss
            except psutil.NoSuchProcess:
                break
            self.curve.append((time.perf_counter() - self._start, taken / 2**30))
            if stop():
                self._process.kill()
            time.sleep(0.02)
        _, errors = self._process.communicate()
        code = self._process.returncode
        if code > 0:
            raise click.ClickException(errors.decode().strip()[-400:])
        return code

    @property
    def peak(self) -> float:
        """Most memory seen, in GiB."""
        return max(taken for _, taken in self.curve)


def prune_in_shards(folder: Path, name: str, shards: int, cap: int) -> dict[str, Any]:
    """Prune a random checkpoint under a cap: at once, and killed half-way and resumed.

    Parameters
    ----------
    folder : Path
        Empty.
    name : str
        timm model.
    shards : int
    cap : int
        Bytes.

    Returns
    -------
    dict
        Sizes in GiB, times in seconds, and the curves of resident memory.
    """
    source = folder / "dense"
    source.mkdir()
    size = write_random_checkpoint(source, name, shards)
    call = ("prune", "--checkpoint", str(source), "--max-memory", f"{cap >> 10}KiB", "--json")
    whole = Watched(*call, "--out", str(folder / "whole"))
    whole.wait()
    half = folder / ".resumed.partial" / "model"
    killed = Watched(*call, "--out", str(folder / "resumed"))
    code = killed.wait(lambda: len(list(half.glob("model-*"))) >= shards // 2)
    resumed = Watched(*call, "--out", str(folder / "resumed"), "--resume")
    resumed.wait()
    names = sorted(path.name for path in (folder / "whole").glob("*.safetensors"))
    equal = all(
        (folder / "whole" / n).read_bytes() == (folder / "resumed" / n).read_bytes() for n in names
    )
    return {
        "model": name,
        "shards": shards,
        "checkpoint_gib": size / 2**30,
        "cap_gib": cap / 2**30,
        "peak_gib": max(whole.peak, killed.peak, resumed.peak),
        "seconds": whole.curve[-1][0],
        "killed_after": killed.curve[-1][0],
        "killed": code < 0,
        "resumed_in": resumed.curve[-1][0],
        "same_bytes": equal,
        "curves": {
            "whole": whole.curve,
            "killed half-way": killed.curve,
            "resumed": resumed.curve,
        },
    }
