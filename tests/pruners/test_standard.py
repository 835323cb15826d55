from __future__ import annotations

import copy
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import depgraph
import pruners

needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="needs transformers"
)
TIMM = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "beit_base_patch16_224",
    "vit_small_patch14_dinov2",
)
TRANSFORMERS = ("ViT", "DeiT", "Beit", "Dinov2")


def of_timm(name: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    return timm.create_model(name, **sizes, num_classes=5).eval()


def of_transformers(name: str, **sizes: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")
    width = {"mlp_ratio": 2} if name == "Dinov2" else {"intermediate_size": 96}
    given = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    made = config(**{**given, "num_attention_heads": 4, "num_labels": 5, **width, **sizes})
    return getattr(transformers, f"{name}ForImageClassification")(made).eval()


def images(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_timm_itself_builds_what_was_pruned(name: str) -> None:
    model = of_timm(name)
    small, plan = pruners.prune(model, images(), ratio=0.4, standard=True)
    found = plan.standard()
    assert found is not None and found["library"] == "timm"
    stock = timm.create_model(found["name"], **found["arguments"]).eval()
    stock.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(stock(images()), small(images()))
    assert type(stock) is type(small) and num_params(small) < 0.6 * num_params(model)
    head_dims = {plan.sizes[name] for name in plan.kept_units if "head_dim" in name}
    assert head_dims == {12}  # cut, to the quotient of the embedding and the heads
    for mode in (True, False):  # the same attributes: it computes the same when trained, too
        torch.manual_seed(0)
        first = stock.train(mode)(images())
        torch.manual_seed(0)
        assert torch.equal(first, small.train(mode)(images()))


@needs_transformers
@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_transformers_itself_reads_what_was_pruned(name: str, tmp_path: Path) -> None:
    model = of_transformers(name)
    small, plan = pruners.prune(model, images(), ratio=0.4, standard=True)
    small.save_pretrained(tmp_path)  # type: ignore[operator]
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again.eval()(images()).logits, small(images()).logits)
    assert num_params(again) == plan.num_params < 0.8 * num_params(model)
    assert again.config.num_attention_heads < 4 and model.config.num_attention_heads == 4
    assert again.config.head_dim < 12 and not hasattr(model.config, "head_dim")


@needs_transformers
@torch.no_grad()
def test_weights_make_up_for_the_scale_that_a_constructor_gives() -> None:
    model = of_transformers("ViT")
    graph = depgraph.trace(model, images())
    kept = {group.name: range(6) for group in graph.groups if group.kind == "head_dim"}
    plain, stock = graph.plan(kept), graph.plan(kept, stock_scale=True)
    small, same = plain.apply(model), stock.apply(model)
    assert small.vit.layers[0].attention.scaling == 12**-0.5  # type: ignore[index, union-attr]
    assert same.vit.layers[0].attention.scaling == 6**-0.5  # type: ignore[index, union-attr]
    torch.testing.assert_close(same(images()).logits, small(images()).logits)
    for mode in ("eager", "sdpa"):
        same.set_attn_implementation(mode)  # type: ignore[operator]
        torch.testing.assert_close(same(images()).logits, small(images()).logits)
    assert plain.standard() is None and stock.standard() is not None
    assert depgraph.Plan.from_json(stock.to_json()).stock_scale


@needs_transformers
def test_an_embedding_is_cut_where_no_unread_parameter_holds_it() -> None:
    without = of_transformers("Dinov2", use_mask_token=False)
    small, _ = pruners.prune(without, images(), ratio=0.4, standard=True)
    assert small.config.hidden_size < 48  # type: ignore[union-attr]
    small, _ = pruners.prune(of_transformers("Dinov2"), images(), ratio=0.4, standard=True)
    assert small.config.hidden_size == 48  # type: ignore[union-attr]


@needs_transformers
@pytest.mark.parametrize("kv_heads", [2, 4])
@torch.no_grad()
def test_a_language_model_with_rotary_positions_keeps_its_head_dims(
    kv_heads: int, tmp_path: Path
) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = {"input_ids": torch.arange(16).view(2, 8), "use_cache": False}
    small, _ = pruners.prune(model, ids, ratio=0.4, standard=True)
    small.save_pretrained(tmp_path)  # type: ignore[operator]
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**ids).logits, small(**ids).logits)
    assert again.config.head_dim == 12 and again.config.hidden_size < 48
    assert again.config.intermediate_size < 96
    assert again.config.num_attention_heads == (4 if kv_heads == 2 else 2)


@pytest.mark.parametrize("name", TIMM[:1])
def test_a_stock_model_is_saved_as_what_it_is(name: str, tmp_path: Path) -> None:
    small, plan = pruners.prune(of_timm(name), images(), ratio=0.4, standard=True)
    depgraph.save(small, tmp_path / "small")
    loaded = depgraph.load(tmp_path / "small")
    assert torch.equal(loaded(images()), small(images()))
    assert depgraph.source_of(loaded) == plan.standard()


def test_a_plan_that_was_read_is_told_its_model() -> None:
    model = of_timm(TIMM[0])
    graph = depgraph.trace(model, images())
    kept = {group.name: range(96) for group in graph.groups if group.kind == "hidden"}
    plan = graph.plan(kept)
    read = depgraph.Plan.from_json(plan.to_json())
    with pytest.raises(depgraph.DepgraphError, match="pass the model"):
        read.standard()
    assert plan.standard() == read.standard(model) == read.standard(plan.apply(model))


def test_cuts_that_no_constructor_can_be_told_are_none() -> None:
    model = of_timm(TIMM[0])
    graph = depgraph.trace(model, images())
    assert graph.plan({"blocks.0.mlp.hidden": range(96)}).standard() is None  # only one block
    half = {group.name: range(2) for group in graph.groups if group.kind == "heads"}
    assert graph.plan(half).standard() is None  # timm makes head dims from the embedding
    own = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert depgraph.trace(own, torch.randn(1, 4)).plan({"hidden": [0]}).standard() is None


def test_what_cannot_be_stock_is_refused() -> None:
    with pytest.raises(depgraph.DepgraphError, match="heads cut alike"):
        pruners.prune(of_timm(TIMM[0]), images(), kinds=["heads"], standard=True)
    with pytest.raises(depgraph.DepgraphError, match="leave out scope"):
        pruners.prune(of_timm(TIMM[0]), images(), scope="isomorphic", standard=True)


@needs_transformers
def test_a_configuration_of_other_sizes_is_not_written(tmp_path: Path) -> None:
    model = of_transformers("ViT")
    small, _ = pruners.prune(model, images(), ratio=0.4)
    for same in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):  # noqa: S301
        with pytest.raises(depgraph.DepgraphError, match=r"depgraph\.save"):
            same.save_pretrained(tmp_path / "no")
        with pytest.raises(depgraph.DepgraphError, match=r"depgraph\.save"):
            same.vit.save_pretrained(tmp_path / "no")
        assert not (tmp_path / "no").exists()
    depgraph.save(small, tmp_path / "small")
    with pytest.raises(depgraph.DepgraphError, match=r"depgraph\.save"):
        depgraph.load(tmp_path / "small").save_pretrained(tmp_path / "no")  # type: ignore[operator]
    model.save_pretrained(tmp_path / "dense")


@needs_transformers
@torch.no_grad()
def test_a_copy_of_a_guarded_model_guards_itself(tmp_path: Path) -> None:
    model = of_transformers("ViT")
    graph = depgraph.trace(model, images())
    kept = {group.name: range(48) for group in graph.groups if group.kind == "hidden"}
    small = graph.plan(kept).apply(model)
    other = copy.deepcopy(small)
    other.classifier.weight.zero_()  # type: ignore[union-attr, operator]
    other.save_pretrained(tmp_path)  # type: ignore[operator]
    read = type(model).from_pretrained(tmp_path).eval()
    assert read.config.intermediate_size == 48
    assert torch.equal(read(images()).logits, other(images()).logits)  # type: ignore[operator]
    assert small.config.intermediate_size == 96  # type: ignore[union-attr]
    assert depgraph.plans_of(small)
