"""Folders that a stranger made: nothing in them runs, and nothing outside them is read."""

from __future__ import annotations

import builtins
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import depgraph
from benchmarks.folders import mutate, outcome, save_all, watched
from depgraph.storing.checkpoint import INDEX
from depgraph.storing.reading import checksum

TIMM = {"library": "timm", "name": "test_vit"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    graph = depgraph.trace(model, torch.zeros(1, 3, 32, 32))
    kept = {group.name: range(0, group.size, 2) for group in graph.prunable}
    depgraph.save(graph.plan(kept).apply(model), tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**data, **changes}))


@pytest.mark.parametrize(
    "recipe",
    [
        {**TIMM, "arguments": {"checkpoint_path": "weights.pt"}},
        {**TIMM, "arguments": {"pretrained": True}},
        {**TIMM, "arguments": {"pretrained_cfg": {"file": "x"}}},
        {**TIMM, "arguments": {"pretrained_cfg_overlay": {"url": "x"}}},
        {**TIMM, "arguments": {"cache_dir": "x"}},
        {**TIMM, "arguments": {"device": "cpu"}},
        {**TIMM, "arguments": {"_private": 1}},
        {**TIMM, "arguments": {"norm_layer": "/tmp/x"}},
        {**TIMM, "arguments": {"norm_layer": {"object": "os:system"}}},
        {**TIMM, "arguments": {"depth": 10**7}},
        {**TIMM, "arguments": {"depth": 10**12}},
        {**TIMM, "arguments": {"depth": 2000}},
        {
            "library": "transformers",
            "name": "AlbertModel",
            "arguments": {"num_hidden_layers": 9999},
        },
        {**TIMM, "arguments": {"forward": "x"}},
        {**TIMM, "arguments": {"a b": 1}},
        {"library": "timm", "name": "hf-hub:someone/model", "arguments": {}},
        {"library": "timm", "name": "local-dir:/tmp", "arguments": {}},
        {"library": "timm", "name": "no_such_model", "arguments": {}},
        {"library": "os", "name": "system", "arguments": {}},
        {"library": "torch", "name": "hub", "arguments": {}},
        {"library": "torchvision", "name": "get_model", "arguments": {}},
        {"library": "torchvision", "name": "resnet18", "arguments": {"weights": "DEFAULT"}},
        {"library": "transformers", "name": "pipeline", "arguments": {}},
        {"library": "transformers", "name": "PreTrainedModel", "arguments": {}},
        {"library": "transformers", "name": "AutoModel", "arguments": {}},
        {"library": "transformers", "name": "utils.hub", "arguments": {}},
        {"library": "transformers", "name": "ViTModel", "arguments": {"auto_map": {"a": "b"}}},
        {"library": "transformers", "name": "ViTModel", "arguments": {"to_dict": 3}},
        {"library": "transformers", "name": "ViTModel", "arguments": {"num_labels": 10**7}},
        {
            "library": "transformers",
            "name": "LlamaModel",
            "arguments": {"_attn_implementation_internal": "flash_attention_2"},
        },
        {
            "library": "transformers",
            "name": "XmodModel",
            "arguments": {"languages": ['a") or boom("']},
        },
        {
            "library": "transformers",
            "name": "ViTModel",
            "arguments": {"attn_implementation": "a"},
        },
        {"library": "transformers", "name": "DetrModel", "arguments": {"backbone": "resnet50"}},
        {
            "library": "transformers",
            "name": "TimmWrapperModel",
            "arguments": {"architecture": "test_vit", "model_args": {"checkpoint_path": "x.pt"}},
        },
        {**TIMM},
        {**TIMM, "arguments": [], "more": 1},
        [],
        "timm",
    ],
)
def test_a_recipe_that_could_do_more_than_make_a_model_is_refused(
    folder: Path, recipe: Any
) -> None:
    if isinstance(recipe, dict):
        library = pytest.importorskip(str(recipe.get("library")))
        getattr(library, "BertModel", None)  # what transformers itself reads when it is first used
    rewrite(folder, recipe=recipe)
    depgraph.save(nn.Linear(2, 2), folder.parent / "other")
    with watched(folder) as seen, pytest.raises(depgraph.DepgraphError):
        depgraph.load(folder)
    assert seen == []


def test_a_constructor_that_makes_too_much_is_stopped(folder: Path) -> None:
    rewrite(folder, recipe={**TIMM, "arguments": {"depth": 1000}})
    with pytest.raises(depgraph.DepgraphError, match="more than"):
        depgraph.load(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"format": 2, "format": 2}',
        '{"format": NaN}',
        '{"format": ' + "9" * 10_000 + "}",
        "\x00",
        "null",
        '{"format": 2}',
    ],
)
def test_json_that_is_deep_or_says_two_things_is_refused(folder: Path, text: str) -> None:
    (folder / "plan.json").write_text(text)
    with pytest.raises(depgraph.DepgraphError, match=r"plan\.json|format"):
        depgraph.load(folder)


def test_units_and_sizes_without_bound_are_refused(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())["plans"][0]
    large = {"sizes": {**plan["sizes"], "embed": 10**9}}
    for change in (large, {"kept_units": {"embed": [10**9]}}):
        rewrite(folder, plans=[{**plan, **change}])
        with pytest.raises(depgraph.DepgraphError):
            depgraph.load(folder)
    for shape in ([2**40, 2**40, 2**40], [-1], "x", None):
        rewrite(folder, plans=[{**plan, "inputs": [{"shape": shape, "dtype": "float32"}]}])
        with pytest.raises(depgraph.DepgraphError):
            depgraph.load(folder)
    rewrite(folder, plans=[{**plan, "inputs": [{"shape": [1], "dtype": "hub"}]}])
    with pytest.raises(depgraph.DepgraphError, match="dtype"):
        depgraph.load(folder)


def test_what_a_message_spells_as_code_is_a_name(folder: Path) -> None:
    rewrite(folder, recipe=None, cls="__import__('os').system('x') or Net")
    with pytest.raises(depgraph.DepgraphError, match="no name of a class"):
        depgraph.load(folder)


def test_a_folder_that_is_called_as_one_in_the_hub_s_cache_is_none(folder: Path) -> None:
    (folder.parent / "snapshots").mkdir()
    place = folder.rename(folder.parent / "snapshots" / "model")
    (place / "plan.json").rename(folder.parent / "plan.json")
    (place / "plan.json").symlink_to(folder.parent / "plan.json")
    with pytest.raises(depgraph.DepgraphError, match="no file in"):
        depgraph.load(place)


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_not_followed(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    with pytest.raises(depgraph.DepgraphError, match="no file in"):
        depgraph.load(folder)


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(depgraph.DepgraphError, match="no file in"):
        depgraph.load(folder)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/tmp/other.safetensors", "..", "", 3])
def test_shards_outside_the_folder_are_neither_read_nor_removed(folder: Path, shard: Any) -> None:
    outside = folder.parent / "other.safetensors"
    save_file({"a": torch.zeros(1)}, outside)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with watched(folder) as seen, pytest.raises(depgraph.DepgraphError, match="names a shard"):
        depgraph.load(folder)
    assert seen == []
    depgraph.save(nn.Linear(2, 2), folder)
    assert outside.exists() and not (folder / INDEX).exists()


@pytest.mark.parametrize("change", ["missing", "shape", "kind", "more"])
def test_tensors_that_do_not_fit_are_named(folder: Path, change: str) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    if change == "missing":
        del tensors["head.bias"]
    elif change == "more":
        tensors["head.more"] = torch.zeros(1)
    else:
        tensors["head.bias"] = torch.zeros(4 if change == "shape" else 3, dtype=torch.int64)
    save_file(tensors, folder / "model.safetensors")
    rewrite(folder, checksums={"model.safetensors": checksum(folder, "model.safetensors")})
    with pytest.raises(depgraph.DepgraphError, match=r"'head\.(bias|more)'"):
        depgraph.load(folder)


def test_a_flipped_bit_in_the_weights_is_seen(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(depgraph.DepgraphError, match="is damaged"):
        depgraph.load(folder)


class Regrouped(nn.Module):
    """Sizes are written into its forward, which is generated anew; it hands on what it is told."""

    def __init__(self, child: str = "inner") -> None:
        super().__init__()
        self.first, self.parts = nn.Linear(8, 16), nn.ModuleDict({child: Told()})
        self.last = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, **told: Any) -> torch.Tensor:
        x = self.first(x).reshape(len(x), 4, 4).transpose(1, 2).reshape(len(x), 16)
        for part in self.parts.values():
            x = part(x, **told)
        return self.last(x)


class Told(nn.Linear):
    def __init__(self) -> None:
        super().__init__(16, 16)

    def forward(self, input: torch.Tensor, **told: Any) -> torch.Tensor:
        return super().forward(input)


def test_names_in_generated_code_are_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    monkeypatch.setattr(builtins, "boom", ran.append, raising=False)
    x = torch.randn(2, 8)
    model = Regrouped().eval()
    graph = depgraph.trace(model, {"x": x})
    kept = {group.name: range(0, group.size, 2) for group in graph.prunable}
    small = graph.plan(kept).apply(model)
    assert "depgraph_rewrite" in vars(type(small))
    depgraph.save(small, tmp_path / "model")
    plan = json.loads((tmp_path / "model" / "plan.json").read_text())["plans"][0]
    plan["inputs"]["items"]["a=boom(1), b"] = None
    rewrite(tmp_path / "model", plans=[plan], ops={}, facts={})
    with pytest.raises(depgraph.DepgraphError, match="cannot be written in the code"):
        depgraph.load(tmp_path / "model", model=Regrouped())
    odd = Regrouped('a"), boom(1), getattr(self, "b').eval()
    with pytest.raises(depgraph.DepgraphError, match="cannot be written in the code"):
        depgraph.trace(odd, x).plan(kept).apply(odd)
    assert ran == []


def test_mutated_folders_load_or_are_refused_and_do_nothing_else(tmp_path: Path) -> None:
    rng = random.Random(1)
    sources = save_all(tmp_path / "saved")
    for source in sources[:4]:
        depgraph.load(source)
    for i in range(60):
        folder = tmp_path / f"{i}"
        shutil.copytree(rng.choice(sources), folder)
        what = mutate(folder, rng)
        result, seen = outcome(folder)
        assert result in ("loaded", "refused") and not seen, (what, result, seen)


@pytest.mark.parametrize("name", ["9" * 5000, "a b " * 2000])
def test_a_name_without_end_does_not_fill_the_message(folder: Path, name: str) -> None:
    plan = json.loads((folder / "plan.json").read_text())["plans"][0]
    rewrite(folder, plans=[{**plan, "kept_units": {name: [0]}}])
    with pytest.raises(depgraph.DepgraphError, match="keeps units") as found:
        depgraph.load(folder)
    assert len(str(found.value)) < 600
