"""Whether a pruned model needs this package: ``python -m benchmarks.stock --python PYTHON``.

ViT, DeiT, BEiT and DINOv2 of timm and of transformers, pruned with ``standard=True``: each goes
through its library's own reading and writing, and as a program of ``torch.export`` to another
interpreter, which has torch and not this package; that runs it at three batches and trains it.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import timm
import torch
from rich.console import Console
from torch import Tensor, nn

import depgraph
import pruners
from cli.output import table
from depgraph.exporting.export import export_program, write_pt2

TIMM = {
    "ViT": "vit_tiny_patch16_224",
    "DeiT": "deit_tiny_patch16_224",
    "BEiT": "beit_base_patch16_224",
    "DINOv2": "vit_small_patch14_dinov2",
}
TRANSFORMERS = {"ViT": "ViT", "DeiT": "DeiT", "BEiT": "Beit", "DINOv2": "Dinov2"}
COLUMNS = ("library", "model", "params kept", "cut", "stock", "pt2 without it", "loss in 5 steps")

_ELSEWHERE = """
import json, sys, torch
from importlib.util import find_spec
found = [name for name in ("depgraph", "timm", "transformers") if find_spec(name)]
model = torch.export.load(sys.argv[1]).module()
difference = 0.0
for images, expected in torch.load(sys.argv[2]):
    with torch.no_grad():
        got = model(images)
    got = got if isinstance(got, torch.Tensor) else torch.utils._pytree.tree_leaves(got)[0]
    difference = max(difference, ((got - expected).abs().max() / expected.abs().max()).item())
images = torch.load(sys.argv[2])[-1][0]
labels = torch.arange(len(images)) % got.shape[1]
optimiser = torch.optim.SGD(model.parameters(), lr=0.02)
losses = []
for _ in range(6):
    out = torch.utils._pytree.tree_leaves(model(images))[0]
    losses.append(torch.nn.functional.cross_entropy(out, labels))
    optimiser.zero_grad()
    losses[-1].backward()
    optimiser.step()
losses = [loss.item() for loss in losses]
print(json.dumps({"found": found, "difference": difference, "losses": losses}))
"""


def of_timm(kind: str) -> nn.Module:
    """A reduced model of timm's."""
    sizes: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 192}
    sizes |= {"depth": 4, "num_heads": 6, "num_classes": 10}
    return timm.create_model(TIMM[kind], **sizes).eval()


def of_transformers(kind: str) -> nn.Module:
    """A reduced model of transformers'."""
    import transformers

    name = TRANSFORMERS[kind]
    width = {"mlp_ratio": 4} if kind == "DINOv2" else {"intermediate_size": 768}
    sizes = {"image_size": 64, "patch_size": 16, "hidden_size": 192, "num_hidden_layers": 4}
    config = getattr(transformers, f"{name}Config")(
        **sizes, **width, num_attention_heads=6, num_labels=10
    )
    return getattr(transformers, f"{name}ForImageClassification")(config).eval()


def first(output: Any) -> Tensor:
    """The logits, of either library."""
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def stock_again(small: nn.Module, plan: depgraph.Plan, folder: Path) -> nn.Module:
    """The pruned model as its library alone makes and reads it."""
    found = plan.standard()
    if found is None:
        raise depgraph.DepgraphError("the plan is none that a constructor can be told")
    if found["library"] == "timm":
        stock = timm.create_model(found["name"], **found["arguments"])
        stock.load_state_dict(small.state_dict(), strict=True)
        return stock.eval()
    small.save_pretrained(folder)  # type: ignore[operator]
    stock, report = type(small).from_pretrained(  # type: ignore[attr-defined]
        folder, output_loading_info=True
    )
    if any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise depgraph.DepgraphError(f"from_pretrained says {report}")
    return stock.eval()


@torch.no_grad()
def row(
    library: str, kind: str, make: Callable[[str], nn.Module], python: str, folder: Path
) -> dict[str, Any]:
    """Prune a model, and do without this package."""
    torch.manual_seed(0)
    model, images = make(kind), torch.randn(7, 3, 64, 64)
    small, plan = pruners.prune(model, images[:1], ratio=0.4, standard=True)
    stock = stock_again(small, plan, folder / "stock")
    same = torch.equal(first(stock(images)), first(small(images)))
    program, _ = export_program(small, images[:1])
    write_pt2(program, folder / "model.pt2")
    pairs = [(images[:n], first(small(images[:n]))) for n in (1, 3, 7)]
    torch.save(pairs, folder / "pairs.pt")
    said = subprocess.run(
        [python, "-I", "-W", "ignore", "-c", _ELSEWHERE, folder / "model.pt2", folder / "pairs.pt"],
        check=True,
        capture_output=True,
        text=True,
    )
    cut = {
        group.kind: f"{plan.sizes[group.name]} to {len(plan.kept_units[group.name])}"
        for group in depgraph.trace(model, images[:1]).prunable
        if group.name in plan.kept_units
    }
    return {
        "library": library,
        "model": kind,
        "kept": plan.num_params / sum(p.numel() for p in model.parameters()),
        "cut": cut,
        "stock": same,
        **json.loads(said.stdout.splitlines()[-1]),
    }


def _cells(r: dict[str, Any]) -> tuple[str, ...]:
    return (
        r["library"],
        r["model"],
        f"{r['kept']:.2f}",
        ", ".join(f"{kind} {change}" for kind, change in r["cut"].items()),
        "the same" if r["stock"] else "DIFFERS",
        f"{r['difference']:.0e}" + (f", beside {', '.join(r['found'])}" if r["found"] else ""),
        f"{r['losses'][0]:.4f} to {r['losses'][-1]:.4f}",
    )


@click.command()
@click.option("--python", required=True, help="An interpreter with torch, without this package.")
@click.option("--json", "as_json", is_flag=True)
def main(python: str, as_json: bool) -> None:
    """Print the table."""
    rows = []
    for library, make in (("timm", of_timm), ("transformers", of_transformers)):
        for kind in TIMM:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(row(library, kind, make, python, Path(folder)))
    if as_json:
        click.echo(json.dumps(rows))
    else:
        Console(width=160).print(table("without this package", COLUMNS, list(map(_cells, rows))))
    if any(
        r["found"] or not r["stock"] or r["difference"] > 1e-4 or r["losses"][-1] >= r["losses"][0]
        for r in rows
    ):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
