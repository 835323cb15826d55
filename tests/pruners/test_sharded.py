"""A checkpoint on disk, pruned shard by shard."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn

import depgraph
import pruners
from cli.running.structures import load_structure
from depgraph.storing.checkpoint import INDEX, Checkpoint, index_text, write_shard
from tests.depgraph.models import Tied, images, tiny


def in_shards(model: nn.Module, directory: Path, count: int = 3) -> Path:
    """Write a state dict as transformers would, in that many files."""
    directory.mkdir()
    state = model.state_dict()
    files = {n: f"model-{i % count:05d}.safetensors" for i, n in enumerate(state)}
    for file in set(files.values()):
        mine = {n: (tuple(t.shape), t.dtype) for n, t in state.items() if files[n] == file}
        write_shard(directory / file, mine, lambda name: [state[name]])
    (directory / INDEX).write_text(index_text(files, 0))
    return directory


def structure(name: str = "vit_base_patch16_224") -> nn.Module:
    with init_empty_weights(include_buffers=False):
        return tiny(name)


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "beit_base_patch16_224"])
@pytest.mark.parametrize("metric", ["l1", "l2", "random"])
def test_it_gives_what_pruning_in_memory_gives(
    name: str, metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("depgraph.storing.checkpoint.PIECE_BYTES", 512)  # many pieces
    model = tiny(name)
    expected, plan = pruners.prune(model, images(), metric, 0.5)
    source = in_shards(model, tmp_path / "dense")
    got = pruners.prune_checkpoint(structure(name), images(), source, tmp_path / "small", metric)
    small = depgraph.load(tmp_path / "small")
    assert got == plan
    assert all(torch.equal(small.state_dict()[k], v) for k, v in expected.state_dict().items())
    with torch.no_grad():
        assert torch.equal(small(images()), expected(images()))
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) == 3


def test_a_saved_model_is_pruned_again_from_its_directory(tmp_path: Path) -> None:
    model = tiny()
    depgraph.save(model, tmp_path / "dense")
    empty = depgraph.load_structure(tmp_path / "dense")
    assert all(parameter.is_meta for parameter in empty.parameters())
    pruners.prune_checkpoint(empty, images(), tmp_path / "dense", tmp_path / "small")
    expected, _ = pruners.prune(model, images())
    assert torch.equal(depgraph.load(tmp_path / "small")(images()), expected(images()))


@pytest.mark.parametrize("metric", ["l1", "random"])
def test_a_weight_that_is_not_finite_is_refused_by_name(metric: str, tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.blocks[1].attn.proj.bias[3] = float("inf")
    source = in_shards(model, tmp_path / "dense")
    with pytest.raises(depgraph.DepgraphError, match=r"'blocks\.1\.attn\.proj\.bias' holds NaN"):
        pruners.prune_checkpoint(structure(), images(), source, tmp_path / "small", metric)
    assert not (tmp_path / "small").exists()


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = Tied()
    state = dict(model.named_parameters())  # without the second name of a tied one
    (tmp_path / "dense").mkdir()
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in state.items()}
    path = tmp_path / "dense" / "model.safetensors"
    write_shard(path, shapes, lambda name: [state[name].detach()])
    example = torch.zeros(1, 4, dtype=torch.long)
    with init_empty_weights(include_buffers=False):
        empty = Tied()
    empty.head.weight = empty.embed.weight
    pruners.prune_checkpoint(empty, example, tmp_path / "dense", tmp_path / "small")
    expected, _ = pruners.prune(model, example)
    assert torch.equal(depgraph.load(tmp_path / "small")(example), expected(example))


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_killed_anywhere_it_resumes_without_loss(stop: int, tmp_path: Path) -> None:
    model = tiny()
    source = in_shards(model, tmp_path / "dense")
    out = tmp_path / "small"
    shards = len(Checkpoint(source).files)
    total = sum(t.num_bytes for t in Checkpoint(source).tensors.values())
    read: list[int] = []

    def kill(stage: str, done: int, of: int) -> None:
        if done + (of if stage == "slice" else 0) > stop * total / shards:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pruners.prune_checkpoint(structure(), images(), source, out, progress=kill)
    assert not out.exists()

    def count(stage: str, done: int, of: int) -> None:
        read.append(done)

    pruners.prune_checkpoint(structure(), images(), source, out, resume=True, progress=count)
    expected, _ = pruners.prune(model, images())
    assert torch.equal(depgraph.load(out)(images()), expected(images()))
    tensors = len(Checkpoint(source).tensors)
    assert len(read) < 2 * tensors  # a finished shard of sums is not read again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "small"]


def test_other_arguments_do_not_resume(tmp_path: Path) -> None:
    source = in_shards(tiny(), tmp_path / "dense")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "small"
    with pytest.raises(KeyboardInterrupt):
        pruners.prune_checkpoint(structure(), images(), source, out, progress=stop)
    with pytest.raises(depgraph.DepgraphError, match="begun with other arguments"):
        pruners.prune_checkpoint(structure(), images(), source, out, ratio=0.25, resume=True)


def test_a_cap_that_cannot_be_kept_is_refused_before_any_work(tmp_path: Path) -> None:
    source = in_shards(tiny(), tmp_path / "dense")
    with pytest.raises(depgraph.DepgraphError, match=r"capped at 1 MiB.*allow at least \d+ MiB"):
        pruners.prune_checkpoint(
            structure(), images(), source, tmp_path / "small", max_memory=1 << 20
        )
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("wrong", [{"ratio": 1.5}, {"scope": "local"}, {"kinds": ["tails"]}])
def test_a_choice_out_of_range_is_refused_before_any_work(
    wrong: dict[str, object], tmp_path: Path
) -> None:
    source = in_shards(tiny(), tmp_path / "dense")
    with pytest.raises(depgraph.DepgraphError):
        pruners.prune_checkpoint(structure(), images(), source, tmp_path / "small", **wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_the_checkpoint_itself_is_never_written_to(tmp_path: Path) -> None:
    source = in_shards(tiny(), tmp_path / "dense")
    other = in_shards(tiny(), tmp_path / "other")
    before = {path: path.read_bytes() for path in (*source.iterdir(), *other.iterdir())}
    for out in (source, other):
        with pytest.raises(depgraph.DepgraphError, match="choose another directory"):
            pruners.prune_checkpoint(structure(), images(), source, out)
        with pytest.raises(depgraph.DepgraphError, match="choose another directory"):
            depgraph.save(tiny(), out)
    assert all(path.read_bytes() == was for path, was in before.items())


def test_memory_that_grows_past_the_cap_stops_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = in_shards(tiny(), tmp_path / "dense")
    taken = iter([1 << 20] * 5 + [1 << 40] * 100)
    monkeypatch.setattr(
        psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=next(taken))
    )
    with pytest.raises(depgraph.DepgraphError, match="capped at 1024 MiB"):
        pruners.prune_checkpoint(
            structure(), images(), source, tmp_path / "small", max_memory=1 << 30
        )
    assert not (tmp_path / "small").exists()


def test_a_second_result_replaces_the_first_and_its_shards(tmp_path: Path) -> None:
    out = tmp_path / "small"
    pruners.prune_checkpoint(structure(), images(), in_shards(tiny(), tmp_path / "dense"), out)
    model = tiny()
    depgraph.save(model, out)
    assert not list(out.glob("model-*")) and not (out / INDEX).exists()
    assert torch.equal(depgraph.load(out)(images()), model(images()))


def test_a_language_model_is_recognised_by_its_config(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=50,
        use_cache=False,
    )
    model = hf.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "dense", max_shard_size="10KB")
    empty, inputs = load_structure(tmp_path / "dense", None)
    pruners.prune_checkpoint(empty, inputs, tmp_path / "dense", tmp_path / "small")
    small, (expected, _) = depgraph.load(tmp_path / "small"), pruners.prune(model, inputs)
    tokens = torch.arange(6)[None]
    assert torch.equal(small(tokens).logits, expected(tokens).logits)
    assert small.config is small.model.config


_WIDTHS = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_TEXT = {**_WIDTHS, "vocab_size": 20, "num_key_value_heads": 2, "use_cache": False}
_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}


@pytest.mark.parametrize("shard_bytes", ["8KB", "1GB"])
@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("ViTForImageClassification", "ViTConfig", {**_WIDTHS, "image_size": 16, "patch_size": 8}),
        ("DINOv3ViTModel", "DINOv3ViTConfig", {**_WIDTHS, "image_size": 16, "patch_size": 8}),
        ("MixtralForCausalLM", "MixtralConfig", {**_TEXT, **_EXPERTS}),
    ],
)
def test_what_transformers_wrote_under_other_names_is_read(
    name: str, config: str, options: dict[str, int], shard_bytes: str, tmp_path: Path
) -> None:
    """Renamed, and with one tensor for each expert where the model has one for all of them."""
    hf = pytest.importorskip("transformers", minversion="5.0")
    getattr(hf, name)(getattr(hf, config)(**options)).save_pretrained(
        tmp_path / "dense", max_shard_size=shard_bytes
    )
    stored = Checkpoint(tmp_path / "dense").tensors
    model, inputs = load_structure(tmp_path / "dense", None)
    assert not stored.keys() <= model.state_dict().keys()
    choices = {"kinds": ["hidden"], "scope": "uniform"}
    pruners.prune_checkpoint(
        model, inputs, tmp_path / "dense", tmp_path / "small", "l2", ratio=0.5, **choices
    )
    whole = getattr(hf, name).from_pretrained(tmp_path / "dense")
    expected, _ = pruners.prune(whole, inputs, "l2", 0.5, **choices)
    found = depgraph.load(tmp_path / "small").state_dict()
    assert found.keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(found[key], tensor), key


def test_a_checkpoint_of_another_model_names_the_first_tensor(tmp_path: Path) -> None:
    source = in_shards(tiny(), tmp_path / "dense")
    with pytest.raises(depgraph.DepgraphError, match=r"does not fit: .*blocks\.0"):
        pruners.prune_checkpoint(
            structure("beit_base_patch16_224"), images(), source, tmp_path / "small"
        )


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    source = in_shards(tiny(), tmp_path / "dense")
    gone = sorted(source.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(depgraph.DepgraphError, match=gone.name):
        Checkpoint(source)


def test_a_metric_with_data_is_refused(tmp_path: Path) -> None:
    source = in_shards(tiny(), tmp_path / "dense")
    with pytest.raises(depgraph.DepgraphError, match="'taylor' cannot be had a shard at a time"):
        pruners.prune_checkpoint(structure(), images(), source, tmp_path / "small", "taylor")


def test_half_precision_stays(tmp_path: Path) -> None:
    source = in_shards(tiny().bfloat16(), tmp_path / "dense")
    pruners.prune_checkpoint(structure(), images(), source, tmp_path / "small")
    files = list((tmp_path / "small").glob("model-*.safetensors"))
    assert {t.dtype for file in files for t in load_file(file).values()} == {torch.bfloat16}
