from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import depgraph
from tests.depgraph.models import WrittenOut, images, tiny
from tests.reference import masked, random_units, randomise, relative_difference
from tests.trial import try_model


class HeadsFirst(nn.Module):
    """Each head's q, k and v lie side by side; their parts are taken by select or by chunk."""

    def __init__(self, chunked: bool = False) -> None:
        super().__init__()
        self.chunked = chunked
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).view(x.shape[0], x.shape[1], 4, 3, 6)
        if self.chunked:
            q, k, v = (part.squeeze(3).transpose(1, 2) for part in qkv.chunk(3, dim=3))
        else:
            q, k, v = (qkv[:, :, :, i].transpose(1, 2) for i in range(3))
        weights = (q @ k.transpose(-1, -2) * 6**-0.5).softmax(-1)
        return x + self.proj((weights @ v).transpose(1, 2).flatten(2))


class EveryThird(nn.Module):
    """Numbers of q, k and v take turns: no split tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 4, 6, 3).permute(4, 0, 2, 1, 3)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.transpose(1, 2).flatten(2))


def torch_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48
    ).eval()


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, 5, 24, generator=torch.Generator().manual_seed(1))


TIMM = ["vit_base_patch16_224", "deit_base_distilled_patch16_224", "beit_base_patch16_224"]
MODELS = {
    **{name: (lambda name=name: tiny(name), images) for name in TIMM},
    "torchvision": (torch_vit, images),
    "written out": (lambda: WrittenOut().eval(), tokens),
    "heads first": (lambda: HeadsFirst().eval(), tokens),
    "heads first, chunked": (lambda: HeadsFirst(chunked=True).eval(), tokens),
}


@pytest.fixture(params=MODELS)
def traced(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, depgraph.DependencyGraph]:
    make, inputs = MODELS[request.param]
    model, example = randomise(make()).double(), inputs().double()
    return model, example, depgraph.trace(model, example, separate=True)


def head_dims(graph: depgraph.DependencyGraph) -> list[depgraph.Group]:
    return [group for group in graph.prunable if group.kind == "head_dim"]


def uneven(graph: depgraph.DependencyGraph) -> dict[str, list[int]]:
    """One dim of q and k goes from each attention, and all but one of v."""
    reads_v = {group.name: any(m.dim == 1 for m in group.members) for group in head_dims(graph)}
    return {
        group.name: [1] if reads_v[group.name] else list(range(1, group.size))
        for group in head_dims(graph)
    }


def test_q_and_k_share_head_dims_that_v_does_not_and_nothing_else_changes(traced) -> None:
    model, example, graph = traced
    together = depgraph.trace(model, example)
    kinds, before = (Counter(g.kind for g in x.prunable) for x in (graph, together))
    assert kinds == {**before, "head_dim": 2 * before["head_dim"]}
    assert (graph.num_params, graph.macs) == (together.num_params, together.macs)


@torch.no_grad()
def test_uneven_cuts_compute_the_masked_original(traced) -> None:
    model, example, graph = traced
    plan = graph.plan(uneven(graph))
    small = plan.apply(model)
    assert len(plan.kept_units) == len(head_dims(graph))
    assert relative_difference(small(example), masked(model, plan)(example)) < 1e-9
    assert plan.macs == depgraph.count_macs(small, example)


@pytest.mark.parametrize("name", TIMM)
def test_random_plans_hold_all_that_is_promised(name: str, monkeypatch) -> None:
    model, example = randomise(tiny(name)).double(), images().double()
    trace = depgraph.trace
    monkeypatch.setattr(depgraph, "trace", lambda *inputs: trace(*inputs, separate=True))
    for seed in range(2):
        assert try_model(model, example, images(3).double(), seed).cut > 0


@torch.no_grad()
def test_pruned_heads_leave_both_head_dims_with_those_that_stay(traced) -> None:
    model, example, graph = traced
    heads = {g.name: [0, 2] for g in graph.prunable if g.kind == "heads"}
    plan = graph.plan({**uneven(graph), **heads})
    assert relative_difference(plan.apply(model)(example), masked(model, plan)(example)) < 1e-9


@torch.no_grad()
def test_a_saved_model_comes_back_with_its_plan_and_can_be_cut_again(tmp_path: Path) -> None:
    model = tiny()
    graph = depgraph.trace(model, images(), separate=True)
    small = graph.plan(uneven(graph)).apply(model)
    depgraph.save(small, tmp_path / "small")
    loaded = depgraph.load(tmp_path / "small")
    assert torch.equal(loaded(images()), small(images()))
    assert depgraph.plans_of(loaded)[0].separate
    again = depgraph.trace(loaded, images())
    plan = again.plan(random_units(again, seed=0))
    assert relative_difference(plan.apply(loaded)(images()), masked(loaded, plan)(images())) < 1e-4


@torch.no_grad()
def test_in_place_gives_the_same_result() -> None:
    model = tiny()
    graph = depgraph.trace(model, images(), separate=True)
    plan = graph.plan(uneven(graph))
    expected = plan.apply(model)(images())
    assert plan.apply(model, inplace=True) is model
    assert torch.equal(model(images()), expected)


def test_training_with_checkpoints_reaches_every_parameter() -> None:
    model = tiny()
    graph = depgraph.trace(model, images(), separate=True)
    small = graph.plan(uneven(graph)).apply(model).train()
    small.set_grad_checkpointing()
    small(images(3)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def test_a_plan_says_whether_it_is_one_of_separate_parts() -> None:
    model = tiny()
    graph = depgraph.trace(model, images(), separate=True)
    plan = graph.plan(uneven(graph))
    read = depgraph.Plan.from_json(plan.to_json())
    assert read == plan
    assert plan.apply(model).state_dict().keys() == read.apply(model).state_dict().keys()
    assert not depgraph.trace(model, images()).plan({}).separate


def test_groups_are_named_after_what_holds_them() -> None:
    graph = depgraph.trace(tiny(), images(), separate=True)
    names = [group.name for group in head_dims(graph)][:2]
    assert sorted(names) == ["blocks.0.attn.head_dim", "blocks.0.attn.qkv.head_dim"]


@pytest.mark.parametrize(
    "model",
    [
        EveryThird(),
        nn.Sequential(nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 2)),
    ],
    ids=["every third", "nothing to separate"],
)
def test_what_no_split_tells_apart_stays_as_it_is(model: nn.Module) -> None:
    plain, separate = (depgraph.trace(model, tokens(), separate=s) for s in (False, True))
    assert separate.separated == {}
    assert [g.name for g in separate.groups] == [g.name for g in plain.groups]


@torch.no_grad()
def test_norms_of_q_and_k_go_with_their_head_dims() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, qk_norm=True, num_classes=3
    )
    model = randomise(model.eval()).double()
    graph = depgraph.trace(model, images().double(), separate=True)
    assert len(head_dims(graph)) == 2
    plan = graph.plan(random_units(graph, seed=1))
    got, expected = (m(images().double()) for m in (plan.apply(model), masked(model, plan)))
    assert relative_difference(got, expected) < 1e-9
