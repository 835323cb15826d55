from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from timm.utils import AverageMeter
from torch import nn

import depgraph
from tests.depgraph.models import TINY, Tied, images, tiny


def pruned(name: str) -> nn.Module:
    model = tiny(name)
    graph = depgraph.trace(model, images())
    return graph.plan({g.name: range(0, g.size, 2) for g in graph.prunable}).apply(model)


@pytest.mark.parametrize("name", TINY)
def test_a_loaded_model_is_the_saved_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    small = pruned(name).train()
    depgraph.save(small, tmp_path / "model")
    loaded = depgraph.load(tmp_path / "model")
    assert loaded.training
    assert torch.equal(loaded.eval()(images()), small.eval()(images()))
    assert loaded.state_dict().keys() == small.state_dict().keys()
    assert dict(loaded.named_buffers()).keys() == dict(small.named_buffers()).keys()


def test_the_plan_is_saved_and_loaded_with_the_model(tmp_path: Path) -> None:
    small = pruned("vit_base_patch16_224")
    depgraph.save(small, tmp_path)
    (plan,) = depgraph.plans_of(depgraph.load(tmp_path))
    assert plan == depgraph.Plan.from_json((tmp_path / "plan.json").read_text())
    assert plan.num_params == sum(p.numel() for p in small.parameters())


def test_what_changed_after_pruning_is_saved_too(tmp_path: Path) -> None:
    small = pruned("vit_base_patch16_224")
    small.reset_classifier(5)
    small.half()
    depgraph.save(small, tmp_path)
    loaded = depgraph.load(tmp_path)
    assert loaded.head.weight.dtype == torch.float16
    assert torch.equal(loaded.head.weight, small.head.weight)


def test_a_dense_model_over_a_pruned_one_leaves_no_plan_behind(tmp_path: Path) -> None:
    depgraph.save(pruned("vit_base_patch16_224"), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    depgraph.save(tiny(), tmp_path)
    assert depgraph.plans_of(depgraph.load(tmp_path)) == ()
    assert (tmp_path / "notes.txt").exists()


def test_tied_parameters_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    depgraph.save(Tied(), tmp_path)
    loaded = depgraph.load(tmp_path)
    assert loaded.head.weight is loaded.embed.weight


def test_the_config_names_the_architecture_in_the_form_of_timm(tmp_path: Path) -> None:
    depgraph.save(pruned("beit_base_patch16_224"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "beit_base_patch16_224"
    assert config["num_classes"] == 10


def test_an_attribute_that_is_no_data_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny()
    model.blocks[0].attn.stream = Path(__file__).open()  # noqa: SIM115
    with pytest.raises(depgraph.DepgraphError, match=r"'blocks\.0\.attn\.stream'"):
        depgraph.save(model, tmp_path / "model")
    model.blocks[0].attn.stream.close()
    assert not (tmp_path / "model").exists()


def test_an_object_of_a_trusted_package_stays_shared(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    meter = AverageMeter()
    meter.update(3.0)
    for layer in model:
        layer.meter = meter
    depgraph.save(model, tmp_path)
    first, second = (layer.meter for layer in depgraph.load(tmp_path))
    assert first is second and first.avg == 3.0


def test_an_object_of_another_package_is_not_made(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.meter = AverageMeter()
    depgraph.save(model, tmp_path)
    text = (tmp_path / "structure.json").read_text()
    changed = text.replace("timm.utils.metrics:AverageMeter", "decimal:Context")
    (tmp_path / "structure.json").write_text(changed)
    with pytest.raises(depgraph.DepgraphError, match="'decimal:Context' is no class of torch"):
        depgraph.load(tmp_path)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(depgraph.DepgraphError, match="no saved model"):
        depgraph.load(tmp_path)


@pytest.mark.parametrize("name", ["structure.json", "model.safetensors", "plan.json"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    depgraph.save(tiny(), tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(depgraph.DepgraphError, match=name.replace(".", r"\.")):
        depgraph.load(tmp_path)


def test_a_class_from_a_package_that_is_not_trusted_is_not_imported(tmp_path: Path) -> None:
    depgraph.save(nn.Linear(2, 2), tmp_path)
    text = (tmp_path / "structure.json").read_text()
    changed = text.replace("torch.nn.modules.linear:Linear", "antigravity:Linear")
    (tmp_path / "structure.json").write_text(changed)
    with pytest.raises(depgraph.DepgraphError, match="import antigravity before"):
        depgraph.load(tmp_path)


def test_a_forward_from_a_file_may_call_aten_ops_only(tmp_path: Path) -> None:
    depgraph.save(pruned("beit_base_patch16_224"), tmp_path)
    text = (tmp_path / "structure.json").read_text()
    (tmp_path / "structure.json").write_text(text.replace("aten.reshape.default", "os.system"))
    with pytest.raises(depgraph.DepgraphError, match="ATen ops only"):
        depgraph.load(tmp_path)


def test_a_failed_save_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depgraph.save(tiny(), tmp_path / "model")
    expected = depgraph.load(tmp_path / "model")(images())

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("depgraph.store.save_file", full)
    with pytest.raises(depgraph.DepgraphError, match="No space left"):
        depgraph.save(pruned("vit_base_patch16_224"), tmp_path / "model")
    assert torch.equal(depgraph.load(tmp_path / "model")(images()), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
