"""Files that `export` wrote, run by what will serve them, and compared with the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depgraph import DepgraphError
from depgraph.exporting.export import INPUT, require_packages

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest output: kernels sum in another order."""


class Served(nn.Module):
    """A model that something else than torch's modules runs, for `domains.measuring.timing`."""

    def __init__(self, run: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._run = run

    def forward(self, x: Tensor) -> Any:
        """What comes out for a batch."""
        return self._run(x)


def load_served(path: Path, form: str) -> Served:
    """What a file that `export` wrote computes.

    Parameters
    ----------
    path : Path
    form : str
        ``"onnx"``, run by onnxruntime on as many CPU threads as torch uses, or ``"pt2"``.

    Raises
    ------
    DepgraphError
        When onnxruntime is not there.
    """
    if form == "pt2":
        program = torch.export.load(path).module()
        return Served(lambda x: program(x))  # no submodule: a program has no modes to set
    require_packages("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(value) for value in session.run(None, {INPUT: x.numpy()})]

    return Served(run)


def largest_difference(
    model: nn.Module,
    served: Served,
    example: Tensor,
    *,
    batches: tuple[int, ...] = (1, 3),
    seed: int,
) -> float:
    """The largest difference between two models' outputs over the largest output.

    Parameters
    ----------
    model : nn.Module
        In eval mode.
    served : Served
    example : Tensor, shape (1, ...)
    batches : tuple of int
        Sizes of the random batches that are tried.
    seed : int

    Raises
    ------
    DepgraphError
        When it is more than `TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for size in batches:
        x = torch.randn(size, *example.shape[1:], generator=generator)
        with torch.inference_mode():
            pairs = zip(pytree.tree_leaves(model(x)), pytree.tree_leaves(served(x)), strict=True)
        for expected, found in pairs:
            difference = (expected - found).abs().max() / expected.abs().max().clamp_min(1e-12)
            worst = max(worst, float(difference))
    if not worst <= TOLERANCE:
        raise DepgraphError(
            f"the exported model's outputs differ by {worst:.1e} of the largest one, more than "
            f"{TOLERANCE:g}; try --no-fold, or write it as it is with --no-check"
        )
    return worst
