"""A checkpoint on disk, pruned shard by shard."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn

import depgraph
import pruners
from depgraph.checkpoint import Checkpoint, write_index, write_shard
from pruners import sharded
from tests.depgraph.models import Tied, images, tiny


def in_shards(model: nn.Module, directory: Path, count: int = 3) -> Path:
    """Write a state dict as transformers would, in that many files."""
    directory.mkdir()
    state = model.state_dict()
    files = {n: f"model-{i % count:05d}.safetensors" for i, n in enumerate(state)}
    for file in set(files.values()):
        mine = {n: (tuple(t.shape), t.dtype) for n, t in state.items() if files[n] == file}
        write_shard(directory / file, mine, lambda name: [state[name]])
    write_index(directory / "model.safetensors.index.json", files, 0)
    return directory


def structure(name: str = "vit_base_patch16_224") -> nn.Module:
    with init_empty_weights(include_buffers=False):
        return tiny(name)


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "beit_base_patch16_224"])
@pytest.mark.parametrize("metric", ["l1", "l2", "random"])
def test_it_gives_what_pruning_in_memory_gives(
    name: str, metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("depgraph.checkpoint.PIECE_BYTES", 512)  # many pieces of each tensor
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


def test_other_arguments_do_not_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert not (tmp_path / "small").exists()


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


def test_the_cap_remembers_the_peak() -> None:
    cap = sharded.MemoryCap()
    cap.check()
    assert cap.peak > 0
