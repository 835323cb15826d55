"""Multiply-accumulates of known models by this project and by the counters that are installed.

``python -m benchmarks.counters``; torch's own counter is always there, fvcore, ptflops, torchinfo,
calflops and thop are asked where they can be imported. Billions, one image of 224 pixels.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import timm
import torch
import torchvision
from rich.console import Console
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import depgraph
from benchmarks.pages import markdown_table
from cli.output import table, write_text

Counter = Callable[[nn.Module, Tensor], float]

MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm vit_base_patch16_224": lambda: timm.create_model("vit_base_patch16_224"),
    "torchvision vit_b_16": lambda: torchvision.models.vit_b_16(weights=None),
    "timm swin_tiny_patch4_window7_224": lambda: timm.create_model("swin_tiny_patch4_window7_224"),
    "timm convnext_tiny": lambda: timm.create_model("convnext_tiny"),
    "torchvision resnet50": lambda: torchvision.models.resnet50(weights=None),
}


def of_torch(model: nn.Module, x: Tensor) -> float:
    """Half the FLOPs of `FlopCounterMode`, in a real run."""
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2


def of_torch_unfused(model: nn.Module, x: Tensor) -> float:
    """The same with torch's attention written out as matrix products."""
    with sdpa_kernel(SDPBackend.MATH):
        return of_torch(model, x)


def of_fvcore(model: nn.Module, x: Tensor) -> float:
    """`FlopCountAnalysis`, which calls multiply-accumulates flops."""
    return import_module("fvcore.nn").FlopCountAnalysis(model, x).total()


def of_ptflops(backend: str) -> Counter:
    """`get_model_complexity_info` by one of its two ways."""

    def count(model: nn.Module, x: Tensor) -> float:
        options = {"as_strings": False, "print_per_layer_stat": False, "backend": backend}
        count_of = import_module("ptflops").get_model_complexity_info
        return count_of(model, tuple(x.shape[1:]), **options)[0]

    return count


def of_torchinfo(model: nn.Module, x: Tensor) -> float:
    """``total_mult_adds`` of `summary`."""
    return import_module("torchinfo").summary(model, input_data=x, verbose=0).total_mult_adds


def of_calflops(model: nn.Module, x: Tensor) -> float:
    """The MACs of `calculate_flops`."""
    options = {"output_as_string": False, "print_results": False}
    count_of = import_module("calflops").calculate_flops
    return count_of(model, input_shape=tuple(x.shape), **options)[1]


def of_thop(model: nn.Module, x: Tensor) -> float:
    """The first of the two numbers of `profile`."""
    return import_module("thop").profile(model, inputs=(x,), verbose=False)[0]


COUNTERS: dict[str, tuple[str, Counter]] = {
    "this project": ("", depgraph.count_macs),
    "FlopCounterMode": ("torch", of_torch),
    "FlopCounterMode, attention unfused": ("torch", of_torch_unfused),
    "FlopCountAnalysis": ("fvcore", of_fvcore),
    "by ops": ("ptflops", of_ptflops("aten")),
    "by modules": ("ptflops", of_ptflops("pytorch")),
    "summary": ("torchinfo", of_torchinfo),
    "calculate_flops": ("calflops", of_calflops),
    "profile": ("thop", of_thop),
}
"""By name: the distribution that has to be installed, if any, and the counter."""


def counted(make: Callable[[], nn.Module], counter: Counter) -> float:
    """What a counter says of a model, whatever it prints meanwhile kept off the screen.

    Parameters
    ----------
    make : callable
        Makes the model anew: some counters leave hooks and buffers in it.
    counter : callable

    Returns
    -------
    float
        Multiply-accumulates.
    """
    torch.manual_seed(0)
    model = make().eval()
    silent: Any = (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    )
    with torch.no_grad(), warnings.catch_warnings(), silent[0], silent[1]:
        warnings.simplefilter("ignore")
        return float(counter(model, torch.randn(1, 3, 224, 224)))


PAGE = """# What a MAC count is of

MACs are the multiply-accumulates of one sample: matrix products, convolutions, attention (queries
with keys, weights with values) and recurrent layers, in whatever way the model writes them. A
linear layer of `i` inputs and `o` outputs has `i * o` for each token, an attention of `n` tokens
and width `d` has `2 * n * n * d`. Not in it: biases, norms, softmax, activations and other
elementwise work, pooling, interpolation, distances, transforms, products that nothing sums, and
what an op of one's own does. Work that does not depend on the batch (the MLP that makes Swin V2's
position bias) counts whole. `tests/depgraph/test_macs.py` has counts by hand. FLOPs are twice as
many; some of the counters below mean MACs when they say FLOPs.

Other counters leave out more, and some count a little of what is left out here. The same models,
one image of 224 pixels, on a CPU, in billions; `python -m benchmarks.counters --out docs/macs.md`
writes this page with the counters that are installed.

{table}
torch's own counter, and those that look at ops as it does, do not see into the attention that a CPU
runs as one op (`scaled_dot_product_attention`, and in evaluation all of `nn.MultiheadAttention`).
ptflops by modules takes timm's attention for the products of queries, keys and values, without the
linear layers in it. torchinfo counts a linear layer once for each image, not for each token.
"""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Page in Markdown.")
def main(as_json: bool, out: Path | None) -> None:
    """Print a table of models by counters, in billions of multiply-accumulates."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    here = {
        f"{package} {version(package)}: {name}" if package else name: counter
        for name, (package, counter) in COUNTERS.items()
        if not package or find_spec(package)
    }
    found = {
        model: {name: counted(make, counter) for name, counter in here.items()}
        for model, make in MODELS.items()
    }
    columns = ["counter", *MODELS]
    rows = [[name, *(f"{found[model][name] / 1e9:.2f}" for model in MODELS)] for name in here]
    if out is not None:
        write_text(out, PAGE.format(table=markdown_table(columns, rows)))
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        Console(width=180).print(table("Billions of MACs, one image", columns, rows))


if __name__ == "__main__":
    main()
