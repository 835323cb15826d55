"""Options of the latency suite: which of the grid to run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.runtimes import PRECISIONS, RUNTIMES

GRID: dict[str, tuple[list[str], list[str]]] = {
    "model": (
        ["vit_base_patch16_224", "beit_base_patch16_224"],
        [
            "vit_base_patch16_224",
            "deit_base_patch16_224",
            "deit_base_distilled_patch16_224",
            "beit_base_patch16_224",
            "beitv2_base_patch16_224",
        ],
    ),
    "ratio": (["0.5"], ["0.25", "0.5", "0.75", "0.95"]),
    "batch": (["1"], ["1", "8", "64"]),
    "device": (["cpu", "cuda"], ["cpu", "cuda"]),
    "precision": (["fp32"], list(PRECISIONS)),
    "runtime": (["eager", "onnxruntime", "cudagraph"], list(RUNTIMES)),
}
"""By option: what runs by default, in minutes, and all there is."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--model``, ``--ratio``, ...: several with commas; ``--full`` for everything."""
    group = parser.getgroup("latency suite")
    for name, (default, everything) in GRID.items():
        group.addoption(
            f"--{name}",
            help=f"of {','.join(everything)}, by comma  [{','.join(default)}]",
        )
    group.addoption("--full", action="store_true", help="the whole grid, for hours")
    group.addoption("--seconds", type=float, default=2.0, help="of timing in turns, each case  [2]")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """What the times depend on, into the JSON."""
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case for each point of the grid that was asked for."""
    for name, (default, everything) in GRID.items():
        if name not in metafunc.fixturenames:
            continue
        said = metafunc.config.getoption(f"--{name}")
        chosen = said.split(",") if said else default
        if metafunc.config.getoption("--full") and not said:
            chosen = everything
        metafunc.parametrize(name, chosen)
