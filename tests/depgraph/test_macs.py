from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, scaled_dot_product_attention

import depgraph


class Op(nn.Module):
    """A function of an input and of parameters of these shapes."""

    def __init__(self, function: Callable[..., Tensor], *shapes: Any) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, *self.weights)


x, tokens = torch.randn(1, 8), torch.randn(1, 4, 8)

PRODUCTS = {
    "mv of samples": (Op(torch.mv, 8), x, 8),
    "mv of a weight": (Op(lambda x, w: torch.mv(w, x[0]), (5, 8)), x, 5 * 8),
    "mv of one vector": (Op(lambda x, w: torch.mv(w, x), (5, 8)), x[0], 5 * 8),
    "addmv": (Op(lambda x, b, w: torch.addmv(b, w, x[0]), 5, (5, 8)), x, 5 * 8),
    "addmv in place": (Op(lambda x, b, w: b.clone().addmv_(w, x[0]), 5, (5, 8)), x, 5 * 8),
    "dot": (Op(lambda x, w: torch.dot(x[0], w), 8), x, 8),
    "vdot": (Op(lambda x, w: torch.vdot(x[0], w), 8), x, 8),
    "vecdot": (Op(torch.linalg.vecdot, 8), tokens, 4 * 8),
    "inner": (Op(torch.inner, (5, 8)), tokens, 4 * 5 * 8),
    "inner with a scalar": (Op(lambda x, w: torch.inner(x, w[0]), 3), x, 0),
    "matmul with a vector": (Op(torch.matmul, 8), tokens, 4 * 8),
    "matmul, broadcast": (Op(torch.matmul, (3, 8, 5)), tokens[:, None], 3 * 4 * 8 * 5),
    "tensordot": (Op(lambda x, w: torch.tensordot(x, w, 2), (4, 8, 5)), tokens, 4 * 8 * 5),
    "tensordot, batch last": (
        Op(lambda x, w: torch.tensordot(w, x, ([1], [-1])), (5, 8)),
        tokens,
        5 * 8 * 4,
    ),
    "outer by tensordot": (Op(lambda x, w: torch.tensordot(x, w, 0), 5), x, 0),
    "multi_dot from the left": (
        Op(lambda x, a, b: torch.linalg.multi_dot([x, a, b]), (8, 6), (6, 5)),
        x,
        8 * 6 + 6 * 5,
    ),
    "multi_dot from the right": (
        Op(lambda x, a, b: torch.linalg.multi_dot([x.flatten(0, 1), a, b]), (8, 6), 6),
        tokens,
        8 * 6 + 4 * 8,
    ),
    "multi_dot with the input last": (
        Op(lambda x, a, b: torch.linalg.multi_dot([a, b, x.mT[0]]), (2, 9), (9, 8)),
        tokens,
        2 * 9 * 8 + 2 * 8 * 4,
    ),
    "addbmm": (
        Op(lambda x, b, w: torch.addbmm(b, x, w), (4, 5), (3, 8, 5)),
        torch.randn(3, 4, 8),
        3 * 4 * 8 * 5,
    ),
    "baddbmm": (
        Op(lambda x, b, w: torch.baddbmm(b, x, w.expand(len(x), -1, -1)), (4, 5), (1, 8, 5)),
        tokens,
        4 * 8 * 5,
    ),
    "bilinear": (nn.Bilinear(8, 3, 5), (x, torch.randn(1, 3)), 5 * 8 * 3 + 5 * 3),
    "matrix power": (
        Op(lambda x, w: x @ torch.linalg.matrix_power(w, 5), (8, 8)),
        x,
        3 * 8**3 + 8**2,
    ),
    "linear on one vector": (nn.Linear(8, 5), x[0], 5 * 8),
    "convolution of one image": (nn.Conv2d(3, 4, 3), torch.randn(3, 8, 8), 4 * 6 * 6 * 3 * 3 * 3),
    "convolution, time first": (
        Op(lambda x, w, b: torch.conv_tbc(x, w, b, 1), (3, 8, 5), 5),
        torch.randn(10, 1, 8),
        10 * 3 * 8 * 5,
    ),
    "grouped_mm": (
        Op(lambda x, w: grouped_mm(x, w), (2, 16, 8)).bfloat16(),
        torch.randn(2, 8, 16).bfloat16(),
        2 * 8 * 16 * 8,
    ),
    "attention": (
        Op(lambda x: scaled_dot_product_attention(x, x[:, :, :3], x[:, :, :3, :5])),
        torch.randn(1, 2, 4, 8),
        2 * (4 * 3 * 8 + 4 * 3 * 5),
    ),
    "attention, tokens first": (
        nn.MultiheadAttention(8, 2),
        (torch.randn(6, 1, 8),) * 3,
        4 * 6 * 8 * 8 + 2 * 6 * 6 * 8,
    ),
    "lstm": (nn.LSTM(8, 6, batch_first=True), tokens, 4 * (4 * 6) * (8 + 6)),
    "lstm, projected": (
        nn.LSTM(8, 6, proj_size=3, batch_first=True),
        tokens,
        4 * ((4 * 6) * (8 + 3) + 6 * 3),
    ),
    "gru both ways, two layers, time first": (
        nn.GRU(8, 6, 2, bidirectional=True),
        torch.randn(4, 1, 8),
        4 * 2 * (3 * 6) * ((8 + 6) + (2 * 6 + 6)),
    ),
    "rnn": (nn.RNN(8, 6, nonlinearity="relu", batch_first=True), tokens, 4 * 6 * (8 + 6)),
    "lstm cell": (nn.LSTMCell(8, 6), x, (4 * 6) * (8 + 6)),
    "gru cell": (nn.GRUCell(8, 6), x, (3 * 6) * (8 + 6)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_an_op_counts_the_products_that_it_sums(name: str) -> None:
    model, inputs, macs = PRODUCTS[name]
    assert depgraph.count_macs(model, inputs) == macs


def test_only_work_that_depends_on_the_batch_is_divided_by_it() -> None:
    product = Op(lambda x, a, b: x @ (a @ b), (8, 6), (6, 5))
    first = Op(lambda x, w: x[0] @ w, (8, 5))
    after = Op(lambda x, a, b: torch.tensordot(a, x, ([0], [1])).mT @ b, (8, 6), (6, 5))
    for batch in (1, 2, 5):
        inputs = torch.randn(batch, 8)
        assert depgraph.count_macs(after, inputs) == 8 * 6 + 6 * 5
        assert depgraph.count_macs(product, inputs) == 8 * 6 * 5 + 8 * 5
        assert depgraph.count_macs(first, inputs) == 8 * 5


@pytest.mark.parametrize(
    "name",
    ["swinv2_cr_tiny_ns_224", "xcit_nano_12_p8_224", "test_vit_relpos", "maxvit_rmlp_nano_rw_256"],
)
def test_macs_do_not_depend_on_the_batch_of_the_example(name: str) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model(name)
        size = model.pretrained_cfg["input_size"]
        assert depgraph.count_macs(model, torch.empty(1, *size)) == depgraph.count_macs(
            model, torch.empty(3, *size)
        )


def vit(size: int, patch: int, width: int, depth: int, mlp: int, classes: int) -> int:
    patches = (size // patch) ** 2
    n = patches + 1
    block = n * width * (3 * width + width + 2 * mlp) + 2 * n * n * width
    return patches * width * 3 * patch**2 + depth * block + width * classes


def swin(width: int, depths: tuple[int, ...], window: int, position: int = 0) -> int:
    """A Swin of 224 pixels; with the position MLP of version 2, which runs once a block."""
    side, macs = 56, 56**2 * 48 * width
    for stage, depth in enumerate(depths):
        if stage:
            side, width = side // 2, width * 2
            macs += side**2 * (2 * width) * width
        n, padded = side**2, (-(-side // window) * window) ** 2
        block = (
            padded * width * 4 * width + 2 * padded * window**2 * width + 2 * n * width * 4 * width
        )
        heads = width // 32
        macs += depth * (block + position * (2 * window - 1) ** 2 * (2 * 512 + 512 * heads))
    return macs + width * 1000


def resnet50() -> int:
    macs, side, into = 112**2 * 3 * 49 * 64, 56, 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(depth):
            step = stride if block == 0 else 1
            macs += side**2 * into * width  # its stride is in the second convolution
            side //= step
            macs += side**2 * (9 * width * width + width * 4 * width)
            macs += side**2 * into * 4 * width if block == 0 else 0
            into = 4 * width
    return macs + 2048 * 1000


def convnext_tiny() -> int:
    macs, side = 56**2 * 3 * 16 * 96, 56
    for width, depth in ((96, 3), (192, 3), (384, 9), (768, 3)):
        if width > 96:
            side //= 2
            macs += side**2 * (width // 2) * 4 * width
        macs += depth * side**2 * (49 * width + 8 * width**2)
    return macs + 768 * 1000


BY_HAND = {
    "vit_b_16": vit(224, 16, 768, 12, 3072, 1000),
    "vit_l_32": vit(224, 32, 1024, 24, 4096, 1000),
    "swin_t": swin(96, (2, 2, 6, 2), 7),
    "swin_v2_t": swin(96, (2, 2, 6, 2), 8, position=1),
    "resnet50": resnet50(),
    "convnext_tiny": convnext_tiny(),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_macs_of_published_models_are_those_on_paper(name: str) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None).eval()
        assert depgraph.count_macs(model, torch.empty(1, 3, 224, 224)) == BY_HAND[name]


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("vit_base_patch16_224", vit(224, 16, 768, 12, 3072, 1000)),
        ("deit_tiny_patch16_224", vit(224, 16, 192, 12, 768, 1000)),
        ("swin_tiny_patch4_window7_224", swin(96, (2, 2, 6, 2), 7)),
        ("resnet50", resnet50()),
        ("convnext_tiny", convnext_tiny()),
    ],
)
def test_macs_of_timm_models_are_those_on_paper(name: str, macs: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        assert depgraph.count_macs(model, torch.empty(1, 3, 224, 224)) == macs
