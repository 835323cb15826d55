"""What each metric costs, in forward and backward passes over the images that it looks at.

``python -m benchmarks.metrics``. Processor time on this CPU, random weights and images: no score is
looked at.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import click
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import depgraph
import pruners
from cli.output import environment, table


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def passes(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """A forward and a backward pass over all batches, with the gradients of all parameters."""
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


@click.command()
@click.option("--model", "name", default="vit_small_patch14_dinov2", show_default=True)
@click.option("--img-size", default=98, show_default=True)
@click.option("--samples", default=256, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--metric", "metrics", multiple=True, default=list(pruners.METRICS))
@click.option("--json", "as_json", is_flag=True)
def main(
    name: str,
    img_size: int,
    samples: int,
    batch_size: int,
    metrics: tuple[str, ...],
    as_json: bool,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=img_size, num_classes=10).eval()
    images, labels = torch.randn(samples, 3, img_size, img_size), torch.arange(samples) % 10
    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    graph = depgraph.trace(model, images[:1])
    passes(model, batches[:1])  # the first of each is slower
    one = seconds(lambda: passes(model, batches))
    rows = []
    for metric in metrics:
        spent = seconds(lambda: pruners.score(model, graph, metric, batches, num_samples=samples))  # noqa: B023
        rows.append({"metric": metric, "seconds": spent, "passes": spent / one})
    if as_json:
        result = {"model": name, "samples": samples, "pass_seconds": one, "metrics": rows}
        click.echo(json.dumps({**result, **environment()}))
        return
    title = f"{name}, {samples} images of {img_size} px; one pass: {one:.1f} s"
    cells = [(r["metric"], f"{r['seconds']:.2f}", f"{r['passes']:.2f}") for r in rows]
    Console().print(table(title, ["metric", "seconds", "forward-backward passes"], cells))


if __name__ == "__main__":
    main()
