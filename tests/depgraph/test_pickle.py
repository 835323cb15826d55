from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import depgraph
from tests.depgraph.models import TINY, images, tiny


def cut(name: str = "vit_base_patch16_224") -> nn.Module:
    """Pruned in every group: head dims too, whose attention gets a forward of its own."""
    model = tiny(name)
    graph = depgraph.trace(model, images())
    return graph.plan({g.name: range(0, g.size, 2) for g in graph.prunable}).apply(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # noqa: S301  it is our own


def saved_by_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("back", [pickled, saved_by_torch, copy.deepcopy])
def test_a_copy_computes_the_same_in_both_modes_and_is_pruned_again(name: str, back: Any) -> None:
    small = cut(name)
    other = back(small)
    assert torch.equal(other(images()), small(images()))
    assert torch.equal(other.train()(images()), small.train()(images()))
    assert isinstance(other, type(tiny(name)))
    assert depgraph.plans_of(other) == depgraph.plans_of(small)
    graph = depgraph.trace(other.eval(), images())
    kept = {group.name: [0] for group in graph.prunable}
    assert graph.plan(kept).apply(other)(images()).shape == (2, 10)


def test_a_copy_of_a_copy_is_one_too() -> None:
    small = cut()
    again = pickled(copy.deepcopy(pickled(small)))
    assert torch.equal(again(images()), small(images()))
    assert all(a is not b for a, b in zip(again.parameters(), small.parameters(), strict=True))


def _run(model: nn.Module, x: Tensor, queue: Any) -> None:
    queue.put(model(x).detach().numpy())


def test_a_spawned_process_gets_the_model() -> None:
    small = cut()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_run, args=(small.requires_grad_(False), images(), queue))
    process.start()
    got = torch.from_numpy(queue.get(timeout=300))
    process.join()
    # Another process has another number of threads: the sums' order differs, not the model.
    torch.testing.assert_close(got, small(images()))


class Scored(Dataset[Tensor]):
    """Items that a model makes, in the worker."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return self.model(images()[index : index + 1])[0]


def test_workers_of_a_loader_get_the_model() -> None:
    items = Scored(cut())
    loader = DataLoader(items, batch_size=1, num_workers=1, multiprocessing_context="spawn")
    got = torch.cat(list(loader))
    torch.testing.assert_close(got, torch.stack([items[0], items[1]]))
