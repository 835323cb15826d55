from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import depgraph
from depgraph.exporting.export import export_program, write_onnx, write_pt2
from tests.cli.conftest import Invoke
from tests.depgraph.models import images, tiny

has_onnx = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not has_onnx, reason="needs the extra 'export'")


def save_pruned(name: str, directory: Path) -> torch.nn.Module:
    model = timm.create_model(name, num_classes=10).eval() if name == "resnet18" else tiny(name)
    graph = depgraph.trace(model, images())
    small = graph.plan({g.name: range(0, g.size, 2) for g in graph.prunable}).apply(model)
    depgraph.save(small, directory)
    return small


@pytest.mark.parametrize("fold", ["--fold", "--no-fold"])
def test_a_pt2_file_computes_what_the_saved_model_does_for_any_batch(
    invoke: Invoke, tmp_path: Path, fold: str
) -> None:
    small = save_pruned("beit_base_patch16_224", tmp_path / "small")
    out = tmp_path / "new" / "served.pt2"
    args = ("export", tmp_path / "small", "--format=pt2", "--out", out, fold)
    result = invoke(*args, "--seconds=0", "--json")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert row["difference"] < 1e-5 and row["speedup"] > 0
    assert bool(row["folded"]) == (fold == "--fold")
    served = torch.export.load(out).module()
    for batch in (1, 5):
        with torch.no_grad():
            torch.testing.assert_close(served(images(batch)), small(images(batch)))
    assert [path.name for path in out.parent.iterdir()] == ["served.pt2"]


@needs_onnx
@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224",
        "deit_base_distilled_patch16_224",
        "beit_base_patch16_224",
        "resnet18",
    ],
)
def test_an_onnx_file_computes_what_the_saved_model_does_for_any_batch(
    invoke: Invoke, tmp_path: Path, name: str
) -> None:
    import onnxruntime

    small = save_pruned(name, tmp_path / "small").eval()
    result = invoke("export", tmp_path / "small", "--format=onnx", "--seconds=0", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["difference"] < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "small" / "model.onnx")
    side = 224 if name == "resnet18" else 32  # what the model's own configuration says
    for batch in (1, 5):
        x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))
        (found,) = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), small(x), atol=1e-5, rtol=1e-4)


@needs_onnx
def test_large_weights_go_to_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr("depgraph.exporting.export._ONE_FILE", 1000)
    model = tiny()
    write_onnx(export_program(model, images())[0], tmp_path / "m.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(None, {"images": images().numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(images()), atol=1e-5, rtol=1e-4)


def test_without_onnx_the_extra_is_named(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str, *args: Any) -> Any:
        return None if name.startswith("onnx") else found(name, *args)

    found = importlib.util.find_spec
    monkeypatch.setattr("depgraph.exporting.export.find_spec", find)
    result = invoke("export", tmp_path, "--format=onnx")
    assert result.exit_code == 1 and "depgraph-prune[export]" in result.stderr


def test_a_difference_is_refused_and_nothing_is_left(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pruned("vit_base_patch16_224", tmp_path / "small")
    monkeypatch.setattr("cli.showing.served.TOLERANCE", -1.0)
    out = tmp_path / "served" / "model.pt2"
    result = invoke("export", tmp_path / "small", "--format=pt2", "--out", out)
    assert result.exit_code == 1 and "differ" in result.stderr
    assert not list(out.parent.iterdir())


def test_a_forward_for_one_batch_size_is_a_sentence() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 12)

    with pytest.raises(depgraph.DepgraphError, match="any batch size"):
        export_program(Fixed(), torch.zeros(2, 3, 4))


def test_a_place_that_cannot_be_written_is_named(invoke: Invoke, tmp_path: Path) -> None:
    save_pruned("vit_base_patch16_224", tmp_path / "small")
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "model.pt2"
    result = invoke("export", tmp_path / "small", "--format=pt2", "--no-check", "--out", out)
    assert result.exit_code == 1 and "cannot write" in result.stderr


def test_a_missing_model_is_a_sentence(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("export", tmp_path / "nothing", "--format=pt2")
    assert result.exit_code == 1 and "is no directory" in result.stderr


_TORCH_ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused}:
            raise ImportError(name + " is not here")

sys.meta_path.insert(0, Refuse())
import torch

program = torch.export.load(sys.argv[1]).module()
expected = torch.load(sys.argv[2], weights_only=True)
for images, wanted in expected:
    torch.testing.assert_close(program(images), wanted)
print(sorted(name for name in sys.modules if name.partition(".")[0] in {refused}))
"""


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "beit_base_patch16_224"])
def test_a_pt2_file_needs_torch_alone(invoke: Invoke, tmp_path: Path, name: str) -> None:
    small = save_pruned(name, tmp_path / "small").eval()
    out = tmp_path / "served.pt2"
    args = ("export", tmp_path / "small", "--format=pt2", "--out", out, "--seconds=0")
    result = invoke(*args, "--json")
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        pairs = [(images(batch), small(images(batch))) for batch in (1, 2, 7)]
    torch.save(pairs, tmp_path / "pairs.pt")
    refused = {"depgraph", "pruners", "domains", "cli", "timm", "transformers", "safetensors"}
    code = _TORCH_ALONE.replace("{refused}", repr(refused))
    command = [sys.executable, "-W", "ignore", "-c", code, str(out), str(tmp_path / "pairs.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_pt2_file_needs_no_class_of_a_library(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1}
    config = transformers.ViTConfig(**sizes, num_attention_heads=2, intermediate_size=32)
    model = transformers.ViTForImageClassification(config).eval()
    program, _ = export_program(model, images(1))
    write_pt2(program, tmp_path / "model.pt2")
    torch.save((images(3), model(images(3)).logits.detach()), tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        f"model = torch.export.load({str(tmp_path / 'model.pt2')!r}).module()\n"
        f"x, y = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        "torch.testing.assert_close(model(x)['logits'], y)\n"
        "model(x)['logits'].sum().backward()\n"
        "assert all(p.grad is not None for p in model.parameters())\n"
        "assert not {'depgraph', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=300)
