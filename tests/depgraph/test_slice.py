from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import depgraph
from tests.depgraph.models import TINY, Tied, WrittenOut, images, tiny
from tests.reference import masked, relative_difference


def halved(model: nn.Module, *kinds: str) -> depgraph.Plan:
    graph = depgraph.trace(model, images())
    return graph.plan(
        {g.name: range(0, g.size, 2) for g in graph.prunable if not kinds or g.kind in kinds}
    )


@pytest.fixture(params=TINY)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    model = tiny(request.param)
    return model, halved(model).apply(model)


def test_half_of_deit_small_loads_into_deit_tiny() -> None:
    small = timm.create_model("deit_small_patch16_224", depth=2).eval()
    graph = depgraph.trace(small, torch.empty(1, 3, 224, 224))
    plan = graph.plan({g.name: range(g.size // 2) for g in graph.prunable if g.kind != "head_dim"})
    cut = plan.apply(small)
    fresh = timm.create_model("deit_tiny_patch16_224", depth=2).eval()
    fresh.load_state_dict(cut.state_dict(), strict=True)
    example = torch.randn(2, 3, 224, 224)
    assert torch.equal(fresh(example), cut(example))


def test_the_original_is_untouched_and_shares_nothing() -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    small = halved(model, "hidden").apply(model)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(model.state_dict()[name], was) for name, was in before.items())


def test_in_place_changes_the_model_itself_to_the_same_result() -> None:
    model = tiny()
    plan = halved(model)
    expected = plan.apply(model)(images())
    attention = model.blocks[0].attn
    assert plan.apply(model, inplace=True) is model
    assert model.blocks[0].attn is attention
    assert torch.equal(model(images()), expected)


def test_predicted_parameters_and_macs_are_those_measured(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    model, small = pair
    plan = halved(model)
    assert plan.num_params == sum(p.numel() for p in small.parameters())
    assert plan.macs == depgraph.count_macs(small, images())


def test_attributes_say_the_new_sizes() -> None:
    small = halved(tiny()).apply(tiny())
    attention = small.blocks[0].attn
    assert (attention.num_heads, attention.head_dim, attention.attn_dim) == (2, 6, 12)
    assert (attention.qkv.in_features, attention.qkv.out_features) == (24, 36)
    assert small.embed_dim == small.num_features == 24
    assert small.blocks[0].norm1.normalized_shape == (24,)
    assert isinstance(small, timm.models.VisionTransformer)
    assert isinstance(attention, type(tiny().blocks[0].attn))


def test_heads_alone_leave_the_library_its_own_forward() -> None:
    model = tiny()
    small = halved(model, "heads", "embed", "hidden").apply(model)
    assert type(small.blocks[0].attn) is type(model.blocks[0].attn)


@pytest.mark.parametrize("fused", [True, False])
def test_fused_and_unfused_attention_agree_after_pruning(fused: bool) -> None:
    model = tiny()
    plan = halved(model)
    expected = plan.apply(model)(images())
    for block in model.blocks:
        block.attn.fused_attn = fused
    small = depgraph.Plan.from_json(plan.to_json()).apply(model)
    torch.testing.assert_close(small(images()), expected)
    for block in small.blocks:
        block.attn.fused_attn = not fused
    torch.testing.assert_close(small(images()), expected)


def test_a_pruned_model_trains(pair: tuple[nn.Module, nn.Module]) -> None:
    small = pair[1].train()
    out = small(images())
    sum(part.sum() for part in (out if isinstance(out, tuple) else (out,))).backward()
    assert all(p.grad is not None for p in small.parameters())


def test_gradient_checkpointing_gives_the_same_gradients(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    small = pair[1]
    small(images()).sum().backward()
    expected = [p.grad.clone() for p in small.parameters() if p.grad is not None]
    small.zero_grad()
    small.set_grad_checkpointing(True)
    small(images()).sum().backward()
    for parameter, want in zip(small.parameters(), expected, strict=False):
        torch.testing.assert_close(parameter.grad, want)


def test_features_and_a_new_head_work(pair: tuple[nn.Module, nn.Module]) -> None:
    small = pair[1]
    features = small.forward_features(images())
    assert features.shape[-1] == 24
    torch.testing.assert_close(small.forward_head(features), small(images()))
    small.reset_classifier(7)
    assert small(images()).shape == (2, 7)


def test_any_batch_size_runs(pair: tuple[nn.Module, nn.Module]) -> None:
    whole = pair[1](images(5))
    torch.testing.assert_close(pair[1](images(5)[:1]), whole[:1], rtol=1e-4, atol=1e-5)


def test_state_dict_keeps_its_names(pair: tuple[nn.Module, nn.Module]) -> None:
    model, small = pair
    assert model.state_dict().keys() == small.state_dict().keys()
    copied = copy.deepcopy(small)
    copied.load_state_dict(small.state_dict())
    assert torch.equal(copied(images()), small(images()))


def test_export_gives_the_same_outputs(pair: tuple[nn.Module, nn.Module]) -> None:
    exported = torch.export.export(pair[1], (images(),))
    torch.testing.assert_close(exported.module()(images()), pair[1](images()))


def test_compile_captures_the_whole_model(pair: tuple[nn.Module, nn.Module]) -> None:
    compiled = torch.compile(pair[1], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), pair[1](images()))
    torch._dynamo.reset()


def test_frozen_parameters_stay_frozen_and_tied_ones_tied() -> None:
    model = Tied()
    model.hidden.weight.requires_grad_(False)
    graph = depgraph.trace(model, torch.zeros(2, 3, dtype=torch.long))
    embed = next(g for g in graph.prunable if g.size == 8)
    small = graph.plan({embed.name: range(3)}).apply(model)
    assert small.head.weight is small.embed.weight
    assert not small.hidden.weight.requires_grad and small.hidden.bias.requires_grad


def test_modes_are_kept_module_by_module() -> None:
    model = tiny().train()
    model.blocks[0].eval()
    small = halved(model).apply(model)
    assert small.training and small.blocks[1].attn.training and not small.blocks[0].attn.training


def test_a_plan_made_in_one_mode_applies_in_the_other() -> None:
    model = tiny(drop_path_rate=0.2)
    plan = halved(model)
    expected = plan.apply(model)(images())
    assert torch.equal(plan.apply(model.train()).eval()(images()), expected)


def test_pruning_twice_is_pruning_once() -> None:
    model = tiny()
    once = depgraph.trace(model, images()).plan({"embed": [0, 4, 8]}).apply(model)
    first = depgraph.trace(model, images()).plan({"embed": range(0, 48, 2)}).apply(model)
    second = depgraph.trace(first, images()).plan({"embed": [0, 2, 4]}).apply(first)
    assert torch.equal(once(images()), second(images()))


def test_sizes_written_into_a_forward_are_replaced_and_dropout_still_works() -> None:
    torch.manual_seed(0)
    model = WrittenOut().eval()
    graph = depgraph.trace(model, torch.randn(2, 5, 24))
    kept = {g.name: [1, 2] for g in graph.prunable}
    small = graph.plan(kept).apply(model)
    masked = copy.deepcopy(model)
    rows = graph.plan(kept).kept["qkv.weight"][0]
    with torch.no_grad():
        gone = torch.ones(72, dtype=torch.bool).index_fill(0, rows, False)
        masked.qkv.weight[gone] = 0
        masked.qkv.bias[gone] = 0
    x = torch.randn(3, 7, 24)
    torch.testing.assert_close(small(x), masked(x))
    small.train()
    assert not torch.equal(small(x), small(x))


def test_a_rewritten_forward_takes_an_argument_that_the_trace_did_not_pass() -> None:
    model = tiny()
    plan = halved(model, "heads", "head_dim")
    x, mask = torch.randn(3, 9, model.embed_dim), torch.randn(9, 9)
    small, expected = plan.apply(model).blocks[0].attn, masked(model, plan).blocks[0].attn
    torch.testing.assert_close(small(x, attn_mask=mask), expected(x, attn_mask=mask))


def test_a_mask_is_taken_as_the_original_takes_it() -> None:
    model = tiny()
    plan, mask = halved(model), torch.ones(17, 17).tril().bool()
    attention, x = plan.apply(model).blocks[0].attn, torch.randn(2, 17, 48)
    kept = plan.kept["blocks.0.attn.qkv.weight"][1]
    dense = torch.zeros_like(x).index_copy(-1, kept, x[..., kept])
    expected = masked(model, plan).blocks[0].attn(dense, attn_mask=mask)[..., kept]
    torch.testing.assert_close(attention(x[..., kept], attn_mask=mask), expected)


class _Keeps(nn.Linear):
    """Leaves in itself what it computes, and returns nothing."""

    def forward(self, inputs: Tensor) -> None:  # type: ignore[override]
        self.last = super().forward(inputs)


class _Stubborn(nn.Module):
    """Checks its own width, and reads what a child computes but does not return."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = _Keeps(4, 6), nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        self.a(inputs)
        if self.a.last.shape[-1] != 6:
            raise ValueError("the width must be six")
        return self.b(self.a.last)


def test_a_model_that_cannot_follow_is_left_as_it_was() -> None:
    model = _Stubborn()
    before = copy.deepcopy(model.state_dict())
    graph = depgraph.trace(model, torch.randn(3, 4))
    with pytest.raises(depgraph.DepgraphError, match="width must be six"):
        graph.plan({"hidden": [0]}).apply(model, inplace=True)
    assert all(torch.equal(model.state_dict()[name], was) for name, was in before.items())
    assert model.a.out_features == 6


class _Named(nn.Module):
    """Takes keyword arguments only, one of them no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, *, values: Tensor, mask: Tensor, twice: bool = False) -> dict[str, Tensor]:
        hidden = self.a(values).relu() * mask.unsqueeze(-1)
        return {"logits": self.b(hidden * 2 if twice else hidden)}


@torch.no_grad()
def test_keyword_inputs_are_traced_pruned_and_written_into_the_plan() -> None:
    model = _Named()
    inputs = {"values": torch.randn(2, 3, 4), "mask": torch.ones(2, 3), "twice": True}
    plan = depgraph.trace(model, inputs).plan({"hidden": [0, 4]})
    for small in (plan.apply(model), depgraph.Plan.from_json(plan.to_json()).apply(model)):
        expected = masked(model, plan)(**inputs)["logits"]
        assert relative_difference(small(**inputs)["logits"], expected) < 1e-6
        assert depgraph.count_macs(small, inputs) == plan.macs


def test_windows_that_are_cut_run_at_any_batch() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=16,
        patch_size=2,
        window_size=4,
        embed_dim=16,
        depths=(2, 1),
        num_heads=(2, 4),
        num_classes=10,
    ).eval()
    graph = depgraph.trace(model, torch.zeros(1, 3, 16, 16))
    small = graph.plan({g.name: range(0, g.size, 2) for g in graph.prunable}).apply(model)
    images = torch.randn(5, 3, 16, 16)
    together = small(images)
    for i in range(5):  # one at a time gives the same
        assert relative_difference(small(images[i : i + 1]), together[i : i + 1]) < 1e-5


class Remembers(nn.Module):
    """Keeps a table it has computed once, and what it last gave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 3)
        self.scales = nn.Parameter(torch.rand(6) + 0.5)
        self.tables: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = str(x.device)
        if key not in self.tables:
            self.tables[key] = self.scales * 2
        self.last = self.first(x) * self.tables[key]
        return self.second(self.last)


def test_what_a_model_remembers_of_an_earlier_forward_does_not_outlive_the_cut() -> None:
    torch.manual_seed(0)
    model, x = Remembers(), torch.randn(5, 8)
    model(x)  # with gradients: what it holds now is no leaf
    held = dict(model.tables)
    graph = depgraph.trace(model, x)
    plan = graph.plan({"hidden": [0, 2, 5]})
    small = plan.apply(model)
    fresh = Remembers()
    fresh.load_state_dict(model.state_dict())
    assert relative_difference(small(x), masked(fresh, plan)(x)) < 1e-5
    assert model.tables == held and model.tables["cpu"].shape == (6,)


def test_a_model_that_was_cut_in_inference_mode_trains() -> None:
    model = tiny()
    with torch.inference_mode():
        small = depgraph.trace(model, images()).plan({"embed": range(24)}).apply(model)
    small.train()(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
