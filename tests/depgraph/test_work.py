from __future__ import annotations

import torch
from torch import nn

import depgraph
from depgraph.costing.work import batch_atoms, work_of
from tests.depgraph.models import images, tiny


def jobs(model: nn.Module, example: torch.Tensor, **sizes: int) -> list[tuple]:
    graph = depgraph.trace(model, example)
    atoms = {graph.group(name)._atom: size for name, size in sizes.items()}
    atoms |= dict.fromkeys(batch_atoms(graph.propagation), 1)
    return [w.job(atoms) for w in work_of(graph.propagation) if not w.is_folded(atoms)]


def test_a_transformer_is_linear_layers_attention_and_rows() -> None:
    graph = depgraph.trace(tiny(), images())
    found = [w.kind for w in work_of(graph.propagation)]
    assert found.count("attention") == 2
    assert found.count("linear") == 2 * 4 + 1
    assert found.count("conv") == 1


def test_work_shrinks_as_the_sliced_model_does() -> None:
    model = tiny()
    graph = depgraph.trace(model, images())
    sizes = {"embed": 40, "blocks.0.attn.heads": 3, "blocks.1.mlp.hidden": 100}
    small = graph.plan({name: range(n) for name, n in sizes.items()}).apply(model)
    assert sorted(jobs(model, images(), **sizes)) == sorted(jobs(small, images()))


def test_convolutions_know_their_groups() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
    found = [job for job in jobs(net, torch.randn(2, 3, 9, 9)) if job[0] == "conv"]
    assert [job[2] for job in found] == [(1, 1, 3, 8, 9, 9), (1, 8, 1, 1, 7, 7)]


def test_an_op_that_is_not_known_is_counted_by_its_elements() -> None:
    class Sorted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sort(-1).values

    assert ("copy", "", (6,)) in jobs(Sorted(), torch.randn(2, 6))


def test_a_gathered_bias_costs_nothing_once_the_forward_is_generated() -> None:
    model = tiny("beit_base_patch16_224")
    kinds = [job[0] for job in jobs(model, images())]
    cut = [job[0] for job in jobs(model, images(), **{"blocks.0.attn.head_dim": 4})]
    assert kinds.count("gather") == 2 and cut.count("gather") == 1
