"""How the engine scales: ``python -m benchmarks.scale``.

Three studies. Models of 22 and 70 billion parameters on the meta device; time over depth, from 6 to
96 blocks; and a checkpoint in shards that is larger than the memory it is pruned in, killed
half-way and resumed. Each measurement has a process of its own, so that memory is its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from rich.console import Console
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

import depgraph
import pruners
from benchmarks.pages import markdown_table, png
from benchmarks.shards import prune_in_shards
from cli.options.params import Bytes
from cli.output import table, write_bytes, write_text

DEPTHS = (6, 12, 24, 48, 96)
SHARDED = "vit_giant_patch14_dinov2"
"""1.1 billion parameters, 4.2 GiB in float32."""


def vit_22b() -> tuple[nn.Module, Tensor]:
    """48 parallel blocks of width 6144 with normed queries and keys (Dehghani et al. 2023)."""
    model = VisionTransformer(
        patch_size=14,
        embed_dim=6144,
        depth=48,
        num_heads=48,
        qk_norm=True,
        block_fn=ParallelScalingBlock,
    )
    return model, torch.empty(1, 3, 224, 224)


def llama_70b() -> tuple[nn.Module, Tensor]:
    """80 blocks of width 8192, 64 heads on 8 groups of keys and values (Touvron et al. 2023)."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config), torch.zeros(1, 128, dtype=torch.long)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "ViT-22B-like": vit_22b,
    "Llama-70B-like": llama_70b,
}


def _meta(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        model, inputs = MODELS[name]()
    params = sum(p.numel() for p in model.parameters())
    seconds: dict[str, float] = {}
    graph = _timed(seconds, "trace + groups", lambda: depgraph.trace(model.eval(), inputs))
    scores = pruners.score(model, graph, "random")
    kept = _timed(seconds, "allocate", lambda: pruners.allocate(graph, scores, ratio=0.5))
    plan = _timed(seconds, "plan + cost", lambda: graph.plan(kept))
    small = _timed(seconds, "slice + verify", lambda: plan.apply(model))
    same = sum(p.numel() for p in small.parameters()) == plan.num_params
    return {
        "model": name,
        "params": params,
        "groups": len(graph.prunable),
        "params_kept": plan.num_params / params,
        "macs": plan.macs,
        "as_predicted": same,
        **seconds,
        "total": sum(seconds.values()),
        "peak_gib": _peak_gib(),
    }


def _timed(seconds: dict[str, float], stage: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = work()
    seconds[stage] = time.perf_counter() - start
    return result


def _peak_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _depth(count: int, rounds: int = 3) -> dict[str, Any]:
    best: dict[str, float] = {}
    for _ in range(rounds):
        with torch.device("meta"):
            model = VisionTransformer(embed_dim=384, num_heads=6, depth=count).eval()
        seconds: dict[str, float] = {}
        graph = _timed(
            seconds, "trace + groups", partial(depgraph.trace, model, torch.empty(1, 3, 224, 224))
        )
        kept = {group.name: range(0, group.size, 2) for group in graph.prunable}
        plan = _timed(seconds, "plan", partial(graph.plan, kept))
        _timed(seconds, "slice + verify", partial(plan.apply, model))
        if not best or sum(seconds.values()) < sum(best.values()):
            best = seconds
    return {"depth": count, **best, "total": sum(best.values())}


def _in_child(study: str, argument: str) -> dict[str, Any]:
    """A measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--child", study, argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{study} {argument} failed: {done.stderr.strip()[-400:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _plot(path: Path, depths: list[dict[str, Any]], sharded: dict[str, Any] | None) -> None:
    figure = Figure(figsize=(11, 4))
    axes = figure.subplots(1, 2 if sharded else 1, squeeze=False)
    left = axes[0][0]
    left.plot([d["depth"] for d in depths], [d["total"] for d in depths], "o-", label="all")
    for stage in ("trace + groups", "slice + verify"):
        left.plot([d["depth"] for d in depths], [d[stage] for d in depths], "o--", label=stage)
    left.set(xlabel="blocks", ylabel="seconds", title="Engine time over depth", ylim=(0, None))
    left.legend()
    if sharded:
        right = axes[0][1]
        for label, curve in sharded["curves"].items():
            right.plot(*zip(*curve, strict=True), label=label)
        right.axhline(sharded["cap_gib"], color="k", ls=":", label="cap")
        right.axhline(sharded["checkpoint_gib"], color="k", ls="--", label="checkpoint")
        right.set(xlabel="seconds", ylabel="GiB resident", title="Memory while pruning in shards")
        right.set_ylim(0, None)
        right.legend()
    write_bytes(path, png(figure))


def _tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    stages = ["trace + groups", "allocate", "plan + cost", "slice + verify", "total"]
    models = [
        [
            r["model"],
            f"{r['params'] / 1e9:.1f}",
            str(r["groups"]),
            f"{r['params_kept']:.2f}",
            *(f"{r[stage]:.1f}" for stage in stages),
            f"{r['peak_gib']:.2f}",
        ]
        for r in result["models"]
    ]
    columns = ["model", "params, B", "groups", "params kept", *stages, "peak GiB"]
    tables = [("Meta device, seconds", columns, models)]
    columns = ["blocks", "trace + groups", "plan", "slice + verify", "total", "total / block"]
    depth = [
        [str(r["depth"]), *(f"{r[c]:.2f}" for c in columns[1:5]), f"{r['total'] / r['depth']:.4f}"]
        for r in result["depth"]
    ]
    tables.append(("Depth, width 384, seconds", columns, depth))
    if s := result["sharded"]:
        row = [
            s["model"],
            str(s["shards"]),
            f"{s['checkpoint_gib']:.2f}",
            f"{s['cap_gib']:.2f}",
            f"{s['peak_gib']:.2f}",
            f"{s['seconds']:.0f}",
            f"{s['killed_after']:.0f} + {s['resumed_in']:.0f}",
            "yes" if s["same_bytes"] and s["killed"] else "no",
        ]
        columns = ["model", "shards", "GiB", "cap", "peak", "s", "killed + resumed, s", "same"]
        tables.append(("Checkpoint in shards", columns, [row]))
    return tables


def _markdown(result: dict[str, Any], picture: str | None) -> str:
    text = "# Scale\n\nMade by `python -m benchmarks.scale --markdown docs/scale.md`.\n"
    if picture:
        text += f"\n![Engine time over depth; memory in shards]({picture})\n"
    for title, columns, rows in _tables(result):
        text += f"\n## {title}\n\n{markdown_table(columns, rows)}"
    return text


_STUDIES: dict[str, Callable[[str], dict[str, Any]]] = {
    "meta": _meta,
    "depth": lambda text: _depth(int(text)),
}


@click.command()
@click.option("--child", type=(str, str), hidden=True)
@click.option("--sharded", "sharded_name", default=SHARDED, show_default=True, help="'' for none.")
@click.option("--shards", default=8, show_default=True)
@click.option("--max-memory", type=Bytes(), default="1.5GiB", show_default=True)
@click.option("--json", "as_json", is_flag=True)
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False), help="With a plot.")
def main(
    child: tuple[str, str] | None,
    sharded_name: str,
    shards: int,
    max_memory: int,
    as_json: bool,
    markdown: Path | None,
) -> None:
    """Print the tables of all three studies."""
    if child is not None:
        click.echo(json.dumps(_STUDIES[child[0]](child[1])))
        return
    result: dict[str, Any] = {
        "models": [_in_child("meta", name) for name in MODELS],
        "depth": [_in_child("depth", str(count)) for count in DEPTHS],
        "sharded": None,
    }
    if sharded_name:
        with tempfile.TemporaryDirectory() as folder:
            result["sharded"] = prune_in_shards(Path(folder), sharded_name, shards, max_memory)
    if markdown is not None:
        picture = markdown.with_suffix(".png")
        _plot(picture, result["depth"], result["sharded"])
        write_text(markdown, _markdown(result, picture.name))
    if as_json:
        click.echo(json.dumps(result))
    else:
        for title, columns, rows in _tables(result):
            Console().print(table(title, columns, rows))


if __name__ == "__main__":
    main()
