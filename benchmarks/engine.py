"""How long the engine takes and what memory it needs, beside Torch-Pruning in the same process.

``python -m benchmarks.engine``, or ``--model vit_large_patch16_224`` for one. Torch-Pruning is a
bench extra; it gets the recipe of its own documentation for timm transformers: head counts told,
attention written out.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import psutil
import timm
import torch
from rich.console import Console
from torch import nn

import depgraph
import pruners
from benchmarks.pages import markdown_table, png
from cli.output import table, write_bytes, write_text
from depgraph.coupling.propagate import Propagation
from depgraph.tracing.trace import trace_forward

SIZES = ("tiny_patch16", "small_patch16", "base_patch16", "large_patch16", "huge_patch14")
MODELS = tuple(f"vit_{size}_224" for size in SIZES)
STEPS = ("trace + groups", "score", "allocate", "plan", "slice + verify")


class Stopwatch:
    """Seconds of named steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, step: Callable[[], Any]) -> Any:
        """Run a step and note how long it took."""
        start = time.perf_counter()
        result = step()
        self.seconds[name] = time.perf_counter() - start
        return result


@contextmanager
def peak_memory(result: dict[str, float]) -> Iterator[None]:
    """Note how far resident memory rose above its start, in MiB, sampled every 2 ms."""
    process = psutil.Process()
    start = highest = process.memory_info().rss
    done = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        result["peak_extra_mib"] = (highest - start) / 2**20


def ours(name: str, ratio: float) -> dict[str, float]:
    """Seconds of each step of this project, and the memory above model and inputs."""
    model: Any = timm.create_model(name).eval()
    example = torch.randn(1, *model.pretrained_cfg["input_size"])
    watch = Stopwatch()
    memory: dict[str, float] = {}
    with peak_memory(memory):
        graph = watch("trace + groups", lambda: depgraph.trace(model, example))
        scores = watch("score", lambda: pruners.score(model, graph, "l2"))
        kept = watch("allocate", lambda: pruners.allocate(graph, scores, ratio=ratio))
        plan = watch("plan", lambda: graph.plan(kept))
        small = watch("slice + verify", lambda: plan.apply(model))
    total = sum(watch.seconds.values())
    trace = trace_forward(model, (example,), {})
    watch("propagate alone", lambda: Propagation(trace).run())
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    with torch.no_grad():
        small(example)
    return {
        **watch.seconds,
        "total": total,
        **memory,
        "model_mib": size,
        "macs_kept": plan.macs / graph.macs,
    }


def torch_pruning(name: str, ratio: float) -> dict[str, float]:
    """Seconds that Torch-Pruning needs to build its graph and prune the same model."""
    import torch_pruning as tp

    model: Any = timm.create_model(name).eval()
    example = torch.randn(1, *model.pretrained_cfg["input_size"])
    heads: dict[nn.Module, int] = {}
    module: Any
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if hasattr(module, "qkv") and hasattr(module, "num_heads"):
            heads[module.qkv] = module.num_heads
    ignored = [m for n, m in model.named_modules() if n in ("head", "head_dist")]
    before = depgraph.count_macs(model, example)
    watch = Stopwatch()
    pruner = watch(
        "build",
        lambda: tp.pruner.BasePruner(
            model,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=ratio,
            ignored_layers=ignored,
            num_heads=heads,
            prune_num_heads=False,
            prune_head_dims=True,
        ),
    )
    watch("prune", pruner.step)
    total = sum(watch.seconds.values())
    for module, count in pruner.num_heads.items():
        attention = next(m for m in model.modules() if getattr(m, "qkv", None) is module)
        attention.num_heads = count
        attention.head_dim = module.out_features // (3 * count)
        attention.attn_dim = module.out_features // 3
    return {
        **watch.seconds,
        "total": total,
        "macs_kept": depgraph.count_macs(model, example) / before,
    }


def _in_turns(name: str, ratio: float, rounds: int) -> dict[str, Any]:
    mine, theirs = [], []
    for _ in range(rounds):
        mine.append(ours(name, ratio))
        if find_spec("torch_pruning"):
            theirs.append(torch_pruning(name, ratio))
    fastest = [min(runs, key=lambda run: run["total"]) if runs else None for runs in (mine, theirs)]
    return {"model": name, "ours": fastest[0], "torch_pruning": fastest[1]}


def _plot(rows: list[dict[str, Any]]) -> bytes:
    """Seconds over the size of the model, both axes in powers of ten."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.5))
    axes = figure.subplots()
    sizes = [r["ours"]["model_mib"] for r in rows]
    for step in STEPS:
        axes.plot(sizes, [r["ours"][step] for r in rows], "--", lw=1, label=step)
    axes.plot(sizes, [r["ours"]["total"] for r in rows], "ko-", label="depgraph-prune")
    if all(r["torch_pruning"] for r in rows):
        peer = [r["torch_pruning"]["total"] for r in rows]
        axes.plot(sizes, peer, "rs-", label="Torch-Pruning")
    axes.set(xscale="log", yscale="log", xlabel="MiB of weights", ylabel="seconds")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return png(figure)


def _markdown(rows: list[dict[str, Any]], ratio: float) -> str:
    columns = ["model", "MiB", *STEPS, "total", "Torch-Pruning", "share", "peak extra MiB"]
    lines = []
    for r in rows:
        mine = r["ours"]
        theirs = r["torch_pruning"]["total"] if r["torch_pruning"] else float("nan")
        seconds = [*(mine[step] for step in STEPS), mine["total"], theirs, mine["total"] / theirs]
        sizes = [f"{mine[size]:.0f}" for size in ("model_mib", "peak_extra_mib")]
        lines.append([r["model"], sizes[0], *(f"{value:.2f}" for value in seconds), sizes[1]])
    return (
        "# Engine\n\nMade by `python -m benchmarks.engine --markdown docs/engine.md`. Seconds to "
        f"prune by L2, {ratio:.0%} of the units, both engines in turns in one process, the fastest "
        f"round of each; torch {torch.__version__}, {torch.get_num_threads()} threads.\n\n"
        f"![Seconds over model size](engine.png)\n\n{markdown_table(columns, lines)}"
    )


@click.command()
@click.option("--model", "models", multiple=True, default=MODELS, help="timm names.")
@click.option("--ratio", default=0.5, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="The fastest counts, of both.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False), help="With a plot.")
def main(
    models: tuple[str, ...], ratio: float, rounds: int, as_json: bool, markdown: Path | None
) -> None:
    """Time both engines, in turns."""
    rows = [_in_turns(name, ratio, rounds) for name in models]
    if markdown is not None:
        write_bytes(markdown.with_suffix(".png"), _plot(rows))
        write_text(markdown, _markdown(rows, ratio))
    if as_json:
        click.echo(json.dumps(rows))
        return
    for r in rows:
        lines = [(key, f"{value:.3f}", "") for key, value in r["ours"].items()]
        if r["torch_pruning"]:
            lines += [
                (f"Torch-Pruning: {k}", "", f"{v:.3f}") for k, v in r["torch_pruning"].items()
            ]
            share = r["ours"]["total"] / r["torch_pruning"]["total"]
            lines.append(("ours / Torch-Pruning", f"{share:.3f}", ""))
        columns = ("seconds, or as named", "ours", "Torch-Pruning")
        Console().print(table(r["model"], columns, lines))


if __name__ == "__main__":
    main()
