"""Writes a model for serving: as ONNX, or as a program of ``torch.export``.

Both take any batch size. The program is made once, folded, and written from there.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from depgraph.coupling.propagate import op_name
from depgraph.errors import DepgraphError
from depgraph.exporting.fold import fold
from depgraph.files import MARK, replacing_with_company
from depgraph.tracing.caches import caches_bypassed
from depgraph.tracing.calls import plain
from depgraph.tracing.trace import structural_copy

INPUT, OUTPUT = "images", "outputs"
"""What the input and the output are called in an ONNX file."""

NEEDED = ("onnx", "onnxscript")
"""Packages that writing ONNX takes."""

_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What torch raises for forwards that it cannot export."""


def export_program(
    model: nn.Module, example: Tensor, *, folded: bool = True
) -> tuple[ExportedProgram, dict[str, int]]:
    """A model in evaluation mode as a program of ATen ops that takes any batch size.

    Parameters
    ----------
    model : nn.Module
        With one input and its weights; not changed.
    example : Tensor, shape (batch, ...)
        Only all but the first dimension of its shape, its dtype and device matter.
    folded : bool
        Fold factors, norms and branches into the layers beside them, see `exporting.fold`.

    Returns
    -------
    program : torch.export.ExportedProgram
        Outputs of a library's own class (those of transformers) are dicts of the same names.
    counts : dict of str to int
        How often each rule folded something; empty where nothing was to be.

    Raises
    ------
    DepgraphError
        When torch cannot export the model for any batch size.

    Examples
    --------
    >>> layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    >>> program, counts = export_program(layer, torch.zeros(1, 3, 8, 8))
    >>> counts
    {'factors': 1}
    >>> program.module()(torch.zeros(5, 3, 8, 8)).shape
    torch.Size([5, 4, 6, 6])
    """
    copy = structural_copy(model).eval()
    forward = copy.forward
    # classes of a library's outputs would have to be known where the program is loaded
    copy.forward = functools.wraps(forward)(lambda *args, **kwargs: plain(forward(*args, **kwargs)))
    with caches_bypassed(copy):
        program = _exported(copy, example)
    if not folded:
        return program, {}
    module, counts = fold(program.module())
    return _exported(module, example), counts


def _exported(module: nn.Module, example: Tensor) -> ExportedProgram:
    # Two of a batch, which torch takes for any number; one it would take for one.
    two = torch.zeros(2, *example.shape[1:], dtype=example.dtype, device=example.device)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # a model may keep what it computed, which stays with the copy that is exported
            warnings.filterwarnings("ignore", "The tensor attribute")
            return torch.export.export(
                module, (two,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False
            )
    except _FAILURES as error:
        raise DepgraphError(
            f"torch.export cannot export the model ({type(module).__name__}) for any batch size: "
            f"{_first_line(error)}"
        ) from error


def write_pt2(program: ExportedProgram, path: str | PathLike[str]) -> None:
    """Write a program for ``torch.export.load``, whole or not at all.

    Parameters
    ----------
    program : torch.export.ExportedProgram
    path : path

    Raises
    ------
    DepgraphError
        When the file cannot be written.
    """
    with _beside(Path(path)) as place:
        torch.export.save(program, place, extra_files={MARK: ""})


def write_onnx(program: ExportedProgram, path: str | PathLike[str]) -> None:
    """Write a program as ONNX, whole or not at all.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        With one input and one output.
    path : path
        Weights of more than 2 GB, more than ONNX can hold in one file, go to ``<path>.data``.

    Raises
    ------
    DepgraphError
        When a package is missing, an op has no form in ONNX, or the file cannot be written.
    """
    require_packages(*NEEDED)
    if program.example_inputs is None:
        raise DepgraphError("the program has no example inputs; make it with export_program")
    module = program.module()
    settle_strides(module)
    made = _onnx_program(_exported(module, program.example_inputs[0][0]))
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    with _beside(Path(path)) as place:
        made.model.metadata_props[MARK] = ""
        made.save(place, external_data=size > _ONE_FILE)


def _onnx_program(program: ExportedProgram) -> torch.onnx.ONNXProgram:
    # The exporter tells of each optional rewriter and overload that it does without.
    noisy = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in noisy]
    results = len(program.graph_signature.user_outputs)
    names = [OUTPUT, *(f"{OUTPUT}_{i}" for i in range(1, results))]
    try:
        for logger in noisy:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            made = torch.onnx.export(
                program, dynamo=True, input_names=[INPUT], output_names=names, verbose=False
            )
    except _FAILURES as error:
        raise DepgraphError(f"torch cannot write this as ONNX: {_first_line(error)}") from error
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
    if made is None:
        raise DepgraphError("this torch wrote no ONNX program; torch 2.6 or later does")
    return made


_ONE_FILE = 1_900_000_000
"""Bytes of weights that fit into one ONNX file, whose format ends at 2 GiB."""


def settle_strides(module: fx.GraphModule) -> None:
    """Let no view of a program depend on how a kernel lays out its result.

    The fused attention of one device returns memory in another order than that of another; a
    reshape that was a view of the one may not be one of the other. ONNX has no strides at all.
    """
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            module.graph.erase_node(node)
        elif op_name(node) == "aten.scaled_dot_product_attention":
            with module.graph.inserting_after(node):
                settled = module.graph.call_function(
                    torch.ops.aten.clone.default,
                    (node,),
                    {"memory_format": torch.contiguous_format},
                )
            node.replace_all_uses_with(settled)
            settled.update_arg(0, node)
    module.recompile()


def require_packages(*names: str) -> None:
    """Refuse to go on without a package.

    Raises
    ------
    DepgraphError
        Naming those that are missing, and the extra that installs them.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise DepgraphError(
            f"ONNX needs {', '.join(missing)}; pip install 'depgraph-prune[export]'"
        )


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary place for a file and what is written next to it; all is moved at the end."""
    try:
        with replacing_with_company(path) as place:
            yield place
    except OSError as error:
        raise DepgraphError(
            f"cannot write '{path}': {error.strerror or error}; choose another place"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


__all__ = ["export_program", "require_packages", "settle_strides", "write_onnx", "write_pt2"]
