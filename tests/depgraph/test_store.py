from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
from torch import Tensor, nn

import depgraph
from depgraph.storing import store
from tests.depgraph.models import TINY, Tied, images, tiny


def pruned(name: str = "vit_base_patch16_224") -> nn.Module:
    model = tiny(name)
    graph = depgraph.trace(model, images())
    return graph.plan({g.name: range(0, g.size, 2) for g in graph.prunable}).apply(model)


def manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "plan.json").read_text())


def rewrite(directory: Path, **changes: Any) -> None:
    (directory / "plan.json").write_text(json.dumps({**manifest(directory), **changes}))


class Net(nn.Module):
    """A class of the user's own, with what such classes hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.order = [self.first, self.second]
        self.shifts = [torch.tensor(1.0), torch.tensor(2.0)]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) * self.shifts[0] + self.shifts[1]


def halved(model: nn.Module, x: Tensor) -> nn.Module:
    return depgraph.trace(model, x).plan({"hidden": [0, 2, 4]}).apply(model)


@pytest.fixture
def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the model had been saved by a process that is gone."""
    monkeypatch.setattr(store, "_remembered", {})


@pytest.mark.usefixtures("another_process")
@pytest.mark.parametrize("name", TINY)
def test_a_loaded_model_is_the_saved_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    small = pruned(name).train()
    small.norm.eval()
    depgraph.save(small, tmp_path / "model")
    store._remembered.clear()
    loaded = depgraph.load(tmp_path / "model")
    assert loaded.training and not loaded.norm.training
    assert torch.equal(loaded.eval()(images()), small.eval()(images()))
    assert loaded.state_dict().keys() == small.state_dict().keys()
    assert dict(loaded.named_buffers()).keys() == dict(small.named_buffers()).keys()
    assert depgraph.plans_of(loaded) == depgraph.plans_of(small)


def test_another_process_loads_a_library_s_model(tmp_path: Path) -> None:
    small = pruned()
    depgraph.save(small, tmp_path / "model")
    torch.save((images(), small(images())), tmp_path / "expected.pt")
    code = (
        "import depgraph, torch\n"
        f"x, y = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"torch.testing.assert_close(depgraph.load({str(tmp_path / 'model')!r})(x), y)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_source_is_taken_and_proven(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=7, drop_path_rate=0.25).eval()
    depgraph.save(
        model, tmp_path, source=("timm", "test_vit", {"num_classes": 7, "drop_path_rate": 0.25})
    )
    loaded = depgraph.load(tmp_path)
    assert loaded.blocks[-1].drop_path1.drop_prob == 0.25
    with pytest.raises(depgraph.DepgraphError, match=r"drop_path1|blocks"):
        depgraph.save(model, tmp_path, source=("timm", "test_vit", {"num_classes": 7}))


def test_a_noted_source_goes_with_what_is_pruned(tmp_path: Path) -> None:
    arguments = {"num_classes": 7, "mlp_ratio": 1.5, "img_size": 32}
    model = depgraph.set_source(
        timm.create_model("test_vit", **arguments).eval(), ("timm", "test_vit", arguments)
    )
    graph = depgraph.trace(model, images())
    small = graph.plan({g.name: range(0, g.size, 2) for g in graph.prunable}).apply(model)
    depgraph.save(small, tmp_path)
    assert manifest(tmp_path)["recipe"]["arguments"] == arguments


def test_plans_one_after_the_other_are_replayed(tmp_path: Path) -> None:
    small = pruned()
    graph = depgraph.trace(small, images())
    smaller = graph.plan({g.name: range(0, g.size, 2) for g in graph.prunable}).apply(small)
    depgraph.save(smaller, tmp_path)
    loaded = depgraph.load(tmp_path)
    assert torch.equal(loaded(images()), smaller(images()))
    assert len(depgraph.plans_of(loaded)) == 2


def test_the_plan_is_saved_and_loaded_with_the_model(tmp_path: Path) -> None:
    small = pruned()
    depgraph.save(small, tmp_path)
    (plan,) = depgraph.plans_of(depgraph.load(tmp_path))
    assert plan == depgraph.Plan.from_json((tmp_path / "plan.json").read_text())
    assert plan.num_params == sum(p.numel() for p in small.parameters())


def test_what_changed_after_pruning_is_saved_too(tmp_path: Path) -> None:
    small = pruned()
    small.reset_classifier(5)
    small.half()
    small.patch_embed.requires_grad_(False)
    depgraph.save(small, tmp_path)
    assert manifest(tmp_path)["recipe"] is not None
    loaded = depgraph.load(tmp_path)
    assert loaded.head.weight.dtype == torch.float16
    assert torch.equal(loaded.head.weight, small.head.weight)
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in small.parameters()
    ]


def test_a_model_pruned_in_half_precision_and_in_training_mode_comes_back(tmp_path: Path) -> None:
    model = tiny().to(torch.bfloat16).train()
    x = images().to(torch.bfloat16)
    graph = depgraph.trace(model, x)
    small = graph.plan({g.name: range(0, g.size, 2) for g in graph.prunable}).apply(model).eval()
    depgraph.save(small, tmp_path)
    assert torch.equal(depgraph.load(tmp_path)(x), small(x))


def test_a_dense_model_over_a_pruned_one_leaves_no_plan_behind(tmp_path: Path) -> None:
    depgraph.save(pruned(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    depgraph.save(tiny(), tmp_path)
    assert depgraph.plans_of(depgraph.load(tmp_path)) == ()
    assert (tmp_path / "notes.txt").exists()


def test_tied_parameters_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    depgraph.save(Tied(), tmp_path)
    untied = Tied()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    for loaded in (depgraph.load(tmp_path), depgraph.load(tmp_path, model=untied)):
        assert loaded.head.weight is loaded.embed.weight


def test_two_tensors_in_one_memory_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.detach().T)
    with pytest.raises(depgraph.DepgraphError, match=r"'0\.weight' and '1\.weight' share memory"):
        depgraph.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_config_names_the_architecture_in_the_form_of_timm(tmp_path: Path) -> None:
    depgraph.save(pruned("beit_base_patch16_224"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "beit_base_patch16_224"
    assert config["num_classes"] == 10


def test_the_process_that_saved_a_model_of_the_user_s_needs_no_instance(tmp_path: Path) -> None:
    small = halved(Net().eval(), torch.randn(2, 6))
    depgraph.save(small, tmp_path)
    loaded, x = depgraph.load(tmp_path), torch.randn(2, 6)
    assert torch.equal(loaded(x), small(x))
    assert loaded.order[0] is loaded.first and loaded.first is not small.first


@pytest.mark.usefixtures("another_process")
def test_another_process_gives_an_instance_of_a_class_of_the_user_s(tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    model = Net().eval()
    model.shifts[1] = torch.tensor(5.0)
    small = halved(model, x)
    depgraph.save(small, tmp_path)
    store._remembered.clear()
    with pytest.raises(depgraph.DepgraphError, match=r"model=Net\(\.\.\.\)"):
        depgraph.load(tmp_path)
    given = Net()
    loaded = depgraph.load(tmp_path, model=given)
    assert torch.equal(loaded(x), small(x))
    assert given.first.out_features == 8 and loaded.first.out_features == 3


@pytest.mark.usefixtures("another_process")
def test_an_instance_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    class Other(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x))) * self.shifts[0] + self.shifts[1]

    depgraph.save(halved(Net().eval(), torch.randn(2, 6)), tmp_path)
    with pytest.raises(depgraph.DepgraphError, match=r"relu.*differs"):
        depgraph.load(tmp_path, model=Other())
    slower = Net()
    slower.first.rate = 0.5
    with pytest.raises(depgraph.DepgraphError, match=r"first\.rate differs"):
        depgraph.load(tmp_path, model=slower)


@pytest.mark.usefixtures("another_process")
def test_a_hook_does_not_get_lost_without_a_word(tmp_path: Path) -> None:
    def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * 2

    model = Net().eval()
    model.first.register_forward_hook(double)
    depgraph.save(halved(model, torch.randn(2, 6)), tmp_path)
    store._remembered.clear()
    with pytest.raises(depgraph.DepgraphError, match="mul"):
        depgraph.load(tmp_path, model=Net())
    given = Net()
    given.first.register_forward_hook(double)
    x = torch.ones(1, 6)
    halved_again = depgraph.load(tmp_path, model=given)
    assert len(halved_again.first._forward_hooks) == 1
    assert halved_again(x).shape == (1, 3)


def test_a_changed_library_model_says_what_was_changed(tmp_path: Path) -> None:
    model = tiny()
    depgraph.save(model, tmp_path)
    source = manifest(tmp_path)["recipe"]
    model.blocks[0].mlp.drop1.p = 0.3
    depgraph.save(model, tmp_path)
    assert "blocks.0.mlp.drop1.p" in manifest(tmp_path)["why"]
    with pytest.raises(depgraph.DepgraphError, match=r"drop1\.p"):
        depgraph.save(model, tmp_path, source=source)


def test_layers_of_torch_s_own_that_hold_their_weights_twice_come_back(tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.r, self.b = nn.Linear(6, 8), nn.LSTM(8, 8, batch_first=True), nn.GRU(8, 8)
            self.c, self.d = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.d(torch.relu(self.c(self.b(self.r(self.a(x))[0])[0])))

    x = torch.randn(2, 5, 6)
    model = Recurrent().eval()
    graph = depgraph.trace(model, x)
    small = graph.plan({g.name: range(0, g.size, 2) for g in graph.prunable}).apply(model)
    assert small.r._flat_weights[0] is small.r.weight_ih_l0
    depgraph.save(small, tmp_path)
    for loaded in (depgraph.load(tmp_path), depgraph.load(tmp_path, model=Recurrent().eval())):
        assert loaded.r._flat_weights[0] is loaded.r.weight_ih_l0
        assert torch.equal(loaded(x), small(x))


class Processor:
    """As diffusers has them: what an attention computes, an object beside the layer."""

    def __call__(self, layer: Held, x: Tensor) -> Tensor:
        return layer.second(torch.relu(layer.first(x)) * layer.options.scale)


@dataclasses.dataclass
class Options:
    scale: Tensor
    steps: Any = None


class Held(nn.Module):
    """What it holds is no module and no registered tensor."""

    def __init__(self, processor: Any = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.processor = Processor() if processor is None else processor
        self.options = Options(torch.tensor(2.0), numpy.float32(3))
        self.names = argparse.Namespace(shift=torch.tensor(0.5), rate=numpy.int64(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x) * int(self.names.rate) + self.names.shift


@pytest.mark.usefixtures("another_process")
def test_processors_records_and_numbers_of_numpy_come_back_or_are_named(tmp_path: Path) -> None:
    model, x = Held().eval(), torch.randn(2, 6)
    model.options.scale, model.names.shift = torch.tensor(4.0), torch.tensor(-1.0)
    small = halved(model, x)
    depgraph.save(small, tmp_path)
    store._remembered.clear()
    loaded = depgraph.load(tmp_path, model=Held())
    assert torch.equal(loaded(x), small(x))
    assert loaded.options.scale == 4 and loaded.names.shift == -1

    class Other(Processor):
        pass

    for odd in (Held(Other()), Held()):
        if type(odd.processor) is Processor:
            odd.names.rate = numpy.int64(5)
        with pytest.raises(depgraph.DepgraphError, match=r"(processor|names|op \d+.*) differs"):
            depgraph.load(tmp_path, model=odd)


@pytest.mark.usefixtures("another_process")
def test_a_model_of_transformers_that_was_called_before_comes_back(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2}
    config = transformers.ViTConfig(**sizes, num_attention_heads=2, intermediate_size=32)
    model = transformers.ViTForImageClassification(config).eval()
    model(images(), output_hidden_states=True)
    graph = depgraph.trace(model, images())
    small = graph.plan({g.name: range(0, g.size, 2) for g in graph.prunable}).apply(model)
    expected = small(images(), output_hidden_states=True)
    depgraph.save(small, tmp_path)
    store._remembered.clear()
    got = depgraph.load(tmp_path)(images(), output_hidden_states=True)
    assert torch.equal(got.logits, expected.logits)
    pairs = zip(got.hidden_states, expected.hidden_states, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(depgraph.DepgraphError, match="no saved model"):
        depgraph.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    depgraph.save(tiny(), tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(depgraph.DepgraphError, match=name.replace(".", r"\.")):
        depgraph.load(tmp_path)


def test_a_folder_of_an_earlier_version_says_so(tmp_path: Path) -> None:
    depgraph.save(tiny(), tmp_path)
    (tmp_path / "structure.json").write_text("{}")
    with pytest.raises(depgraph.DepgraphError, match="by an earlier version"):
        depgraph.load(tmp_path)
    depgraph.save(tiny(), tmp_path)
    assert not (tmp_path / "structure.json").exists()


def test_weights_that_this_tool_did_not_write_are_kept(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(depgraph.DepgraphError, match="did not write"):
        depgraph.save(tiny(), tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "mine"


def test_files_have_the_modes_that_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        depgraph.save(tiny("beit_base_patch16_224"), tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert set(modes.values()) == {0o644} and "buffers.safetensors" in modes
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755


def test_a_failed_save_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depgraph.save(tiny(), tmp_path / "model")
    expected = depgraph.load(tmp_path / "model")(images())

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("depgraph.storing.store.save_file", full)
    with pytest.raises(depgraph.DepgraphError, match="No space left"):
        depgraph.save(pruned(), tmp_path / "model")
    assert torch.equal(depgraph.load(tmp_path / "model")(images()), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_that_does_not_hold_what_was_written_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store.save_file

    def flipped(tensors: dict[str, Tensor], path: Path, **kwargs: Any) -> None:
        real({name: tensor + 1 for name, tensor in tensors.items()}, path, **kwargs)

    monkeypatch.setattr("depgraph.storing.store.save_file", flipped)
    with pytest.raises(depgraph.DepgraphError, match="does not come back"):
        depgraph.save(tiny(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_gradient_hook_of_a_parameter_is_not_lost(register: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    plan = depgraph.trace(model, torch.randn(1, 4)).plan({"hidden": range(3)})
    handle = getattr(model[0].weight, register)(lambda x: None)
    for lose in (lambda: plan.apply(model), lambda: depgraph.save(model, tmp_path / "model")):
        with pytest.raises(depgraph.DepgraphError, match=r"0\.weight' has a gradient hook"):
            lose()
    assert not (tmp_path / "model").exists()
    handle.remove()
    depgraph.save(plan.apply(model), tmp_path / "model")


def test_what_cannot_be_copied_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(depgraph.DepgraphError, match="attribute 'lock' of a Sequential"):
        depgraph.trace(model, torch.randn(1, 4))


def test_a_sparse_buffer_stays_and_is_not_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    model.register_buffer("mask", torch.eye(3).to_sparse())
    small = depgraph.trace(model, torch.randn(1, 4)).plan({"hidden": range(3)}).apply(model)
    assert torch.equal(small.mask.to_dense(), torch.eye(3))  # type: ignore[operator, union-attr]
    with pytest.raises(depgraph.DepgraphError, match="'mask' is a Tensor"):
        depgraph.save(small, tmp_path / "model")


def test_a_constructor_that_computes_with_numbers_is_found(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.regnet_y_400mf(weights=None, num_classes=3).eval()
    depgraph.save(model, tmp_path / "model")
    store._remembered.clear()
    loaded = depgraph.load(tmp_path / "model")
    source = depgraph.source_of(loaded)
    assert source is not None and source["name"] == "regnet_y_400mf"
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
