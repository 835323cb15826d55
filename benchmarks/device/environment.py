"""(a) What the machine is, how long nothing takes on it, and the most it can do."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from shutil import which
from typing import Any

import numpy as np
import torch

from benchmarks.device.record import Record, Row
from benchmarks.device.settings import Settings
from benchmarks.device.tables import Table, milliseconds
from benchmarks.runtimes import PRECISIONS, RUNTIMES, Forward
from domains.measuring.stand import device_name, find_device
from domains.measuring.timing import TimingSettings, in_turns

PACKAGES = ("torchvision", "timm", "transformers", "safetensors", "torchao", "triton")


def run(record: Record, settings: Settings) -> None:
    """Name the machine, and time what bounds all other times."""
    record.facts.update(facts(settings.device))
    record.save()
    for precision in PRECISIONS:
        record.attempt(f"{precision} product", functools.partial(_product, precision, settings))
    record.attempt("copy", lambda: _copy(settings))
    for name in ("two events and nothing between", "empty op, eager", "empty op, cudagraph"):
        record.attempt(name, functools.partial(_floor, name, settings))


def facts(device: str) -> dict[str, Any]:
    """Card, driver and versions; of what is not there, nothing."""
    where = find_device(device)
    found: dict[str, Any] = {
        "device": device_name(where),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if where.type == "cuda":
        known = torch.cuda.get_device_properties(where)
        found |= {
            "driver": _driver(where.index or 0),
            "cuda": torch.version.cuda,
            "cudnn": str(torch.backends.cudnn.version()),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "capability": f"{known.major}.{known.minor}",
            "multiprocessors": known.multi_processor_count,
            "memory_gib": known.total_memory / 2**30,
        }
    return found


def _driver(index: int) -> str:
    if not which("nvidia-smi"):
        return "not known (no nvidia-smi)"
    asked = "driver_version,power.limit,clocks.max.sm"
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={asked}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    text = done.stdout.strip()
    return text if done.returncode == 0 and text else f"not known (nvidia-smi: {text})"


def empty_op(device: str, runtime: str) -> Forward:
    """An op on one number: what it takes is what any op takes at the least."""
    one = torch.zeros(1, device=device)
    if runtime != "cudagraph":
        return lambda _: one.add_(1)
    return RUNTIMES[runtime](_AddOne(one), one)


class _AddOne(torch.nn.Module):
    def __init__(self, one: torch.Tensor) -> None:
        super().__init__()
        self.one = one

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.one.add_(1)


def wake(device: str) -> None:
    """Bring an idle GPU to the clock that it works at."""
    if not device.startswith("cuda"):
        return
    a = torch.ones(4096, 4096, device=device, dtype=torch.bfloat16)
    end = time.perf_counter() + 0.1
    while time.perf_counter() < end:
        a @ a
        torch.cuda.synchronize()


def _floor(name: str, settings: Settings) -> Row:
    wake(settings.device)
    nothing = name.startswith("two events")
    run: Forward = (
        (lambda _: None) if nothing else empty_op(settings.device, name.rpartition(" ")[2])
    )
    return {"ms": _median_ms(run, torch.empty(0, device=settings.device), rounds=200)}


def _median_ms(run: Forward, images: torch.Tensor, rounds: int = 20) -> float:
    settings = TimingSettings(1, seconds=0.0, min_rounds=rounds)
    return float(np.median(in_turns([run], images, settings))) * 1e3


def _product(precision: str, settings: Settings) -> Row:
    side = 8192 if settings.cuda else 256
    a = torch.randn(side, side, device=settings.device).to(PRECISIONS[precision])
    wake(settings.device)
    out = torch.empty_like(a)
    ms = _median_ms(lambda _: torch.mm(a, a, out=out), a)
    return {"ms": ms, "tera_per_second": 2 * side**3 / ms / 1e9, "side": side}


def _copy(settings: Settings) -> Row:
    source = torch.ones(1 << (30 if settings.cuda else 25), device=settings.device)
    target = torch.empty_like(source)
    ms = _median_ms(lambda _: target.copy_(source), source)
    return {"ms": ms, "gb_per_second": 2 * source.nbytes / ms / 1e6}


def tables(record: Record) -> list[Table]:
    """Versions; floors and peaks."""
    said = [(name, f"{value:.1f}" if isinstance(value, float) else str(value))
            for name, value in record.facts.items()]  # fmt: skip
    lines = []
    for key, row in record.rows.items():
        reached = ""
        if "tera_per_second" in row:
            side = row["side"]
            reached = f"{row['tera_per_second']:.2f} TFLOP/s, {side} x {side} x {side}"
        elif "gb_per_second" in row:
            reached = f"{row['gb_per_second']:.0f} GB/s, read and written"
        lines.append((key, milliseconds(row), reached))
    return [
        Table("", ("", ""), said),
        Table(
            "Medians of 200 rounds (floors) and 20 rounds (peaks). fp32 products are in TF32 on a "
            "GPU.",
            ("floor or peak", "ms", "reached"),
            lines,
        ),
    ]
