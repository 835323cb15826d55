"""The temperature of an attention that loses head dims, made up for in the weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depgraph
from pruners.refitting.compensation import compensate
from tests.depgraph.models import images, tiny
from tests.interpret import masked_outputs
from tests.reference import random_units, randomise, relative_difference

WIDTH, HEADS, DIM = 24, 4, 16


def cut(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, Tensor]:
    """A model without a half of every group, and what it has to give."""
    torch.manual_seed(0)
    graph = depgraph.trace(model, inputs)
    plan = graph.plan({g.name: torch.randperm(g.size)[: g.size // 2] for g in graph.prunable})
    return plan.apply(model), masked_outputs(graph, plan, model, inputs)[0]


def first(output: Any) -> Tensor:
    return next(x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor))


def keeps_its_forward(small: nn.Module, model: nn.Module, name: str) -> bool:
    return type(small.get_submodule(name)) is type(model.get_submodule(name))


TIMM = {
    "plain": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8}),
    "normed": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "qk_norm": True}),
    "rotated": ("vit_small_patch16_rope_224", {"img_size": 32, "patch_size": 8}),
    "mixed": ("vit_small_patch16_rope_mixed_224", {"img_size": 32, "patch_size": 8}),
}


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_both_ways_to_compute_attention_are_exact_in_both_modes(name: str, fused: bool) -> None:
    kind, settings = TIMM[name]
    made = timm.create_model(kind, depth=1, embed_dim=48, num_heads=4, num_classes=3, **settings)
    model = randomise(made.eval())
    model.blocks[0].attn.fused_attn = fused
    x = images()
    small, expected = cut(model, (x,))
    assert keeps_its_forward(small, model, "blocks.0.attn")
    for training in (False, True):
        for flag in (True, False):
            small.train(training).blocks[0].attn.fused_attn = flag
            assert relative_difference(small(x), expected) < 1e-5


def _transformer(name: str, config: str, **settings: Any) -> nn.Module:
    hf = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    made = getattr(hf, config)(**{**size, "intermediate_size": 40, **settings})
    model: nn.Module = randomise(getattr(hf, name)(made).eval())
    return model


@pytest.mark.parametrize("traced", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["ViT", "Llama"])
@torch.no_grad()
def test_both_ways_of_transformers_are_exact(family: str, traced: str) -> None:
    if family == "ViT":
        settings = {"image_size": 32, "patch_size": 8}
        model, x = _transformer("ViTModel", "ViTConfig", **settings), images()
    else:
        settings = {"vocab_size": 20, "num_key_value_heads": 2, "use_cache": False}
        model = _transformer("LlamaModel", "LlamaConfig", **settings)
        x = torch.arange(10).reshape(2, 5)
    model.set_attn_implementation(traced)
    small, expected = cut(model, (x,))
    assert family == "Llama" or keeps_its_forward(small, model, "layers.0.attention")
    # Llama's groups of heads are counted by a number that only one of the two reads
    for implementation in (traced,) if family == "Llama" else ("sdpa", "eager"):
        small.set_attn_implementation(implementation)
        assert relative_difference(first(small(x)), expected) < 1e-5


def test_a_scale_that_is_passed_on_stays_and_so_do_the_weights() -> None:
    model = _transformer("ViTModel", "ViTConfig", image_size=32, patch_size=8)
    small, _ = cut(model, (images(),))
    attention = small.get_submodule("layers.0.attention")
    assert attention.scaling == model.get_submodule("layers.0.attention").scaling
    assert small.depgraph_plans[-1].factors == ()


@torch.no_grad()
def test_shifted_windows_whose_mask_is_added_in_another_view_are_exact_both_ways() -> None:
    windows = {"img_size": 32, "patch_size": 2, "window_size": 4}
    sizes = {"embed_dim": 32, "depths": (2,), "num_heads": (2,), "num_classes": 3}
    made = timm.create_model("swin_tiny_patch4_window7_224", **windows, **sizes)
    model = randomise(made.eval())
    small, expected = cut(model, (images(),))
    for fused in (True, False):
        for block in small.layers[0].blocks:
            block.attn.fused_attn = fused
        assert relative_difference(small(images()), expected) < 1e-5


@torch.no_grad()
def test_cosine_attention_has_no_temperature_by_width() -> None:
    model = randomise(
        timm.create_model(
            "swinv2_tiny_window8_256",
            img_size=32,
            patch_size=2,
            window_size=4,
            embed_dim=16,
            depths=(2,),
            num_heads=(2,),
            num_classes=3,
        ).eval()
    )
    small, expected = cut(model, (images(),))
    assert small.depgraph_plans[-1].factors == ()
    assert relative_difference(small(images()), expected) < 1e-5


class Base(nn.Module):
    """Self-attention whose forward follows its attributes; subclasses score in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim, self.fused, self.dropout_prob = HEADS, DIM, True, 0.25
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * DIM)
        self.out = nn.Linear(HEADS * DIM, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim))
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(*self.parts(x))
        return self.out(y.transpose(1, 2).flatten(2))


class LiteralElsewhere(Base):
    """Its other way to attend has the number of the original width written into it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.mT * 0.25).softmax(-1) @ v


class LiteralInTraining(Base):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.training:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.mT / 4).softmax(-1) @ v


class AsTensor(Base):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / torch.sqrt(torch.tensor(float(q.shape[-1])))).softmax(-1) @ v


class ReadTwice(Base):
    """Queries are values of another product too, keys are not."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v + q.sigmoid())


class AllReadTwice(Base):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v + q.sigmoid() + k.sigmoid())


class Itself(Base):
    """Queries that are the keys: a factor would come in twice."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, v)


class Roots(Base):
    """Queries and keys take a root of the scale each."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = 1 / math.sqrt(math.sqrt(q.shape[-1]))
        return ((q * scale) @ (k * scale).mT).softmax(-1) @ v


class NormedByRoots(Base):
    """Queries and keys have a norm without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)


class Unclear(Base):
    """A number that equals the scale, whose name does not say what for."""

    def __init__(self) -> None:
        super().__init__()
        self.magic = 0.25


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        (Base, True),
        (LiteralElsewhere, False),
        (LiteralInTraining, False),
        (ReadTwice, True),
        (AllReadTwice, False),
        (Itself, False),
        (Roots, True),
        (NormedByRoots, True),
        (Unclear, False),
    ],
)
@torch.no_grad()
def test_a_forward_stays_only_where_weights_make_up_for_every_way(
    kind: type[Base], kept: bool
) -> None:
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Linear(7, WIDTH), kind(), nn.Linear(WIDTH, 3)).eval())
    x = torch.randn(2, 5, 7)
    graph = depgraph.trace(model, x)
    units = {g.name: range(g.size // 4) for g in graph.prunable if g.kind == "head_dim"}
    plan = graph.plan(units)
    small, expected = plan.apply(model), masked_outputs(graph, plan, model, (x,))[0]
    assert keeps_its_forward(small, model, "1") is kept
    assert small[1].dropout_prob == 0.25
    for training in (False, True):
        assert relative_difference(small.train(training)(x), expected) < 1e-5
    small[1].fused = False
    assert relative_difference(small(x), expected) < 1e-5


@torch.no_grad()
def test_a_scale_that_a_tensor_holds_never_follows_the_width() -> None:
    model, x = (
        randomise(nn.Sequential(nn.Linear(7, WIDTH), AsTensor()).eval()),
        torch.randn(2, 5, 7),
    )
    try:
        small, expected = cut(model, (x,))
    except depgraph.DepgraphError as error:
        assert "constant" in str(error)
    else:
        assert relative_difference(small(x), expected) < 1e-5


class Twice(nn.Module):
    """One attention, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(7, WIDTH), Base(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.attention(x + self.attention(x)))


@torch.no_grad()
def test_an_attention_that_is_called_twice_is_multiplied_once() -> None:
    model, x = randomise(Twice().eval()), torch.randn(2, 5, 7)
    small, expected = cut(model, (x,))
    assert keeps_its_forward(small, model, "attention")
    assert relative_difference(small(x), expected) < 1e-5


@torch.no_grad()
def test_in_place_and_from_json_multiply_too() -> None:
    model, x = randomise(tiny()), images()
    graph = depgraph.trace(model, x)
    plan = graph.plan(random_units(graph, 0, ratio=0.5))
    expected = plan.apply(model)(x)
    assert torch.equal(depgraph.Plan.from_json(plan.to_json()).apply(model)(x), expected)
    assert torch.equal(plan.apply(model, inplace=True)(x), expected)


@torch.no_grad()
def test_refitted_queries_have_the_scale_that_the_cut_gave_them() -> None:
    """Nothing is lost where what is removed was zero, and so a refit has nothing to change."""
    model, x = tiny(), images(32)
    graph = depgraph.trace(model, x)
    head_dims = [g for g in graph.prunable if g.kind == "head_dim"]
    plan = graph.plan({g.name: range(g.size // 2) for g in (*head_dims, graph.group("embed"))})
    small = plan.apply(model)
    before = small.blocks[0].attn.qkv.weight.clone()
    compensate(model, small, plan, [(x, torch.zeros(len(x)))], damping=1e6)
    after = small.blocks[0].attn.qkv.weight
    assert relative_difference(after, before) < 1e-3
    small.blocks[0].attn.qkv.weight.copy_(before)
    rows = plan.kept["blocks.0.attn.qkv.weight"][0]
    columns = plan.kept["blocks.0.attn.qkv.weight"][1]
    original = model.blocks[0].attn.qkv.weight[rows][:, columns]
    queries = len(rows) // 3
    torch.testing.assert_close(before[:queries], original[:queries] * 0.5**0.5)
    assert torch.equal(before[queries:], original[queries:])
