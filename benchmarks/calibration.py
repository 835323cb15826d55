"""Memory and time of the least squares over a growing number of images, beside an earlier build.

``python -m benchmarks.calibration [--before DIR]``, where DIR is a checkout of another commit. Each
number is of a process of its own: peak resident memory above what the process had with both models
made, and time in terms of the dense model's forward over the same images, batch by batch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from cli.output import emit, environment, table
from depgraph import DepgraphError

_CHILD = """
import itertools, json, resource, sys, time
import timm, torch, depgraph
from pruners.refitting.compensation import compensate

name, size, batch, count, whole = sys.argv[1], *map(int, sys.argv[2:6])
torch.manual_seed(0)
model = timm.create_model(name, img_size=size, num_classes=10).eval()
graph = depgraph.trace(model, torch.zeros(1, 3, size, size))
share = {"hidden": 0.3, "head_dim": 0.5}
plan = graph.plan(
    {g.name: range(int(share[g.kind] * g.size)) for g in graph.prunable if g.kind in share}
)
small = plan.apply(model)

class Batches:
    def __iter__(self):
        draw = torch.Generator().manual_seed(0)
        for _ in range(count // batch):
            yield torch.randn(batch, 3, size, size, generator=draw), torch.zeros(batch)

few = list(itertools.islice(Batches(), 8))
with torch.no_grad():
    model(few[0][0]), small(few[0][0])
    began = time.perf_counter()
    for x, _ in few:
        model(x)
    forward = (time.perf_counter() - began) / len(few) * (count // batch)
del few
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began, cpu = time.perf_counter(), time.process_time()
compensate(model, small, plan, list(Batches()) if whole else Batches())
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"mib": (peak - before) / 1024, "seconds": seconds, "cpu_seconds": cpu,
                  "forward_seconds": forward, "macs_kept": plan.macs / graph.macs}))
"""


def measured(root: Path, arguments: list[str]) -> dict[str, Any]:
    """What a process with the packages below a folder took."""
    ran = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        raise DepgraphError(f"the process in {root} failed: {ran.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return {**row, "forwards": row["seconds"] / row["forward_seconds"]}


@click.command()
@click.option("--model", default="vit_small_patch16_224", show_default=True)
@click.option("--img-size", default=96, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option(
    "--images", multiple=True, type=int, default=(256, 512, 2048, 8192), show_default=True
)
@click.option("--before", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--images-before", multiple=True, type=int, default=(64, 128, 256), show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    model: str,
    img_size: int,
    batch_size: int,
    images: tuple[int, ...],
    before: Path | None,
    images_before: tuple[int, ...],
    as_json: bool,
) -> None:
    """Print the table: this build at all numbers of images, an earlier one at those that fit."""
    here = Path(__file__).resolve().parent.parent
    jobs = [("before", before.resolve(), n) for n in images_before] if before is not None else []
    jobs += [("now", here, n) for n in sorted({*images, *(images_before if before else ())})]
    rows = []
    for build, root, count in jobs:
        whole = str(int(build == "before"))  # the earlier build goes through them once, in memory
        said = [model, str(img_size), str(batch_size), str(count), whole]
        rows.append({"build": build, "images": count, **measured(root, said)})
    columns = ["build", "images", "MiB above the models", "seconds", "forwards of the dense model"]
    lines = [
        (
            *(r["build"], str(r["images"]), f"{r['mib']:.0f}"),
            *(f"{r['seconds']:.1f}", f"{r['forwards']:.2f}"),
        )
        for r in rows
    ]
    title = f"{model} at {img_size} px, batches of {batch_size}"
    emit({"rows": rows, **environment()}, as_json, table(title, columns, lines))


if __name__ == "__main__":
    main()
