"""A sliced model computes what the original computes with the removed units switched off."""

import functools
from dataclasses import dataclass, field

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import depgraph
from tests.reference import (
    masked,
    measured_macs,
    measured_params,
    random_units,
    randomise,
    relative_difference,
    state,
)


@dataclass(frozen=True)
class Case:
    """A tiny configuration of a timm architecture."""

    name: str
    arch: str
    options: dict[str, object] = field(default_factory=dict, hash=False)
    fused: bool = True

    def __str__(self) -> str:
        return self.name


VIT, DEIT, DISTILLED, BEIT, BEITV2 = (
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
)
CASES = [
    Case("vit", VIT),
    Case("vit unfused", VIT, fused=False),
    Case("vit without qkv bias", VIT, {"qkv_bias": False}),
    Case("vit with qk norm", VIT, {"qk_norm": True}),
    Case("vit with qk norm unfused", VIT, {"qk_norm": True}, fused=False),
    Case("vit with layer scale", VIT, {"init_values": 0.1}),
    Case(
        "vit with norms in attention and mlp",
        VIT,
        {"scale_attn_norm": True, "scale_mlp_norm": True},
    ),
    Case("vit without class token", VIT, {"class_token": False, "global_pool": "avg"}),
    Case("vit with register tokens", VIT, {"reg_tokens": 3, "no_embed_class": True}),
    Case("vit with pre norm", VIT, {"pre_norm": True}),
    Case("vit with attention pooling", VIT, {"class_token": False, "global_pool": "map"}),
    Case("vit of any image size", VIT, {"dynamic_img_size": True}),
    Case("deit", DEIT),
    Case("deit distilled", DISTILLED),
    Case("deit distilled unfused", DISTILLED, fused=False),
    Case("beit", BEIT),
    Case("beit unfused", BEIT, fused=False),
    Case(
        "beit with shared position bias",
        BEIT,
        {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    ),
    Case(
        "beit with both position biases unfused",
        BEIT,
        {"use_shared_rel_pos_bias": True},
        fused=False,
    ),
    Case("beit with swiglu and its norm", BEIT, {"swiglu_mlp": True, "scale_mlp": True}),
    Case("beit with absolute positions", BEIT, {"use_abs_pos_emb": True, "global_pool": "token"}),
    Case("beitv2", BEITV2),
]


def build(case: Case, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = timm.create_model(
        case.arch,
        **{
            "img_size": 32,
            "patch_size": 8,
            "depth": 2,
            "embed_dim": 48,
            "num_heads": 4,
            "num_classes": 10,
            **case.options,
        },
    )
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = case.fused
    return randomise(model.eval()).to(dtype)


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


@functools.cache
def traced(case: Case) -> tuple[nn.Module, depgraph.DependencyGraph]:
    model = build(case)
    return model, depgraph.trace(model, images())


@pytest.mark.parametrize("case", CASES, ids=str)
@given(seed=st.integers(0, 2**31))
@settings(
    max_examples=1,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@torch.no_grad()
def test_any_plan_computes_the_masked_original_and_costs_what_it_predicts(case, seed):
    model, graph = traced(case)
    before = state(model)
    plan = graph.plan(random_units(graph, seed))
    small = plan.apply(model)
    assert relative_difference(small(images()), masked(model, plan)(images())) < 1e-9
    assert plan.num_params == measured_params(small)
    assert plan.macs == measured_macs(small, images())
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_single_precision_agrees_too_and_every_kind_of_group_is_cut(case):
    model = build(case, torch.float32)
    graph = depgraph.trace(model, images(torch.float32))
    units = random_units(graph, seed=0, ratio=0.5)
    assert {graph.group(name).kind for name in units} == {"embed", "heads", "head_dim", "hidden"}
    plan = graph.plan(units)
    expected = masked(model, plan)(images(torch.float32))
    got = plan.apply(model)(images(torch.float32))
    assert relative_difference(got, expected) < 1e-4
    assert relative_difference(got, model(images(torch.float32))) > 1e-2


@pytest.mark.parametrize("arch", [VIT, DISTILLED, BEIT, BEITV2])
@torch.no_grad()
def test_fused_and_unfused_attention_agree_after_the_same_plan(arch):
    fused, unfused = Case("fused", arch), Case("unfused", arch, fused=False)
    outputs = []
    for case in (fused, unfused):
        model, graph = traced(case)
        outputs.append(graph.plan(random_units(graph, seed=3)).apply(model)(images()))
    assert relative_difference(outputs[0], outputs[1]) < 1e-9


@pytest.mark.parametrize("kind", ["embed", "heads", "head_dim", "hidden"])
@pytest.mark.parametrize("arch", [VIT, DISTILLED, BEIT])
@torch.no_grad()
def test_each_kind_of_group_alone_computes_the_masked_original(arch, kind):
    model, graph = traced(Case(arch, arch))
    units = {
        name: kept
        for name, kept in random_units(graph, seed=5, ratio=0.5).items()
        if graph.group(name).kind == kind
    }
    plan = graph.plan(units)
    assert plan.num_params < graph.num_params
    assert relative_difference(plan.apply(model)(images()), masked(model, plan)(images())) < 1e-9


@torch.no_grad()
def test_one_unit_left_in_every_group_still_computes_the_masked_original():
    model, graph = traced(Case("beit", BEIT))
    plan = graph.plan({group.name: [group.size - 1] for group in graph.groups if not group.frozen})
    assert relative_difference(plan.apply(model)(images()), masked(model, plan)(images())) < 1e-9
