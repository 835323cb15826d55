"""Random networks for property tests: blocks of many kinds, as source that builds them.

A network is a list of block kinds and seeds, so that leaving one out, or a smaller seed, is a
simpler network: hypothesis and `benchmarks.property` shrink failures this way.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks import (
    attention,
    images,
    modes,
    sizes,
    tokens,
    unusual,
    values,
    weights,
)
from tests.networks.writer import Block, Shape, Writer

T = TypeVar("T")

STARTS: dict[str, Shape] = {
    "tokens": (6, 12),
    "image": (3, 8, 8),
    "words": (6,),
    "sequence": (6, 12),
}
"""Shape of the input, without the batch; that of a sequence is its second dimension."""

OTHER_SIZES: dict[str, tuple[Shape, ...]] = {
    "tokens": ((12, 12), (4, 12), (7, 12)),
    "image": ((3, 16, 8), (3, 8, 16), (3, 16, 16)),
    "words": ((12,), (4,), (7,)),
    "sequence": ((12, 12), (4, 12), (7, 12)),
}
"""Sizes that a network may be called with besides the one it is traced with."""

ON_TOKENS: dict[str, Writer] = {
    "linear": tokens.linear,
    "mlp": tokens.mlp,
    "gated": tokens.gated,
    "attention": attention.attention,
    "linear_attention": attention.linear_attention,
    "channel_attention": attention.channel_attention,
    "norm": tokens.norm,
    "gate": tokens.squeeze,
    "mixer": tokens.mixer,
    "convolution": tokens.convolution,
    "shuffle": tokens.shuffle,
    "joined": tokens.joined,
    "parted": tokens.parted,
    "table": tokens.table,
    "sums": tokens.sums,
    "in_place": tokens.in_place,
    "tied": tokens.tied,
    "outer": unusual.outer,
    "library": unusual.library,
    "loop": unusual.loop,
    "padded": unusual.padded,
    "maxout": unusual.maxout,
    "merged": unusual.merged,
    "rotary": unusual.rotary,
    "looked_up": unusual.looked_up,
    "unruled": unusual.unruled,
    "nested": unusual.nested,
    "rows": unusual.norm_of_rows,
    "resample": tokens.shorter,
    "switch": tokens.to_image,
    "arithmetic": sizes.arithmetic,
    "branches": sizes.branches,
    "sequence_first": sizes.sequence_first,
    "new_tensors": values.new_tensors,
    "alibi": values.alibi,
    "literals": values.literals,
    "held_widths": values.held_widths,
    "gradients": modes.gradients,
    "hooked": modes.hooked,
    "staged": modes.staged,
    "reparametrised": weights.reparametrised,
    "computed": weights.computed,
}
ON_IMAGES: dict[str, Writer] = {
    "convolution": images.convolution,
    "norm": images.norm,
    "gate": images.excite,
    "mlp": images.inverted,
    "shuffle": images.shuffle,
    "joined": images.joined,
    "resample": images.resample,
    "attention": images.windows,
    "table": images.table,
    "switch": images.to_tokens,
    "arithmetic": sizes.on_images,
}
KINDS = tuple(dict.fromkeys([*ON_TOKENS, *ON_IMAGES]))
"""Kinds of block; what an image has no block for is a convolution there."""


@dataclass(frozen=True)
class Network:
    """A network by its description.

    Attributes
    ----------
    start : str
        One of `STARTS`.
    blocks : tuple of (str, int)
        Kind and seed of each block.
    seed : int
        Decides about the stem, the head and how blocks are put together, and how it is traced.
    """

    start: str
    blocks: tuple[tuple[str, int], ...]
    seed: int = 0

    @classmethod
    def random(cls, seed: int, longest: int = 4) -> Network:
        """The network of that seed."""
        generator = random.Random(seed)
        number = generator.randint(1, longest)
        blocks = tuple((generator.choice(KINDS), generator.randrange(2**16)) for _ in range(number))
        return cls(generator.choice(list(STARTS)), blocks, generator.randrange(2**16))

    @property
    def flexible(self) -> bool:
        """Whether it reads sizes from its input, so that it may take others."""
        return self._drawn("flexible", (True, True, False))

    @property
    def batch(self) -> int:
        """Batch that it is traced with."""
        return self._drawn("batch", (1, 2, 2, 3))

    @property
    def dtype(self) -> torch.dtype:
        """Type that it is traced in."""
        return self._drawn("dtype", (torch.float64, torch.float64, torch.float32, torch.bfloat16))

    @property
    def training(self) -> bool:
        """Whether it is traced in training mode."""
        return self._drawn("training", (False,) * 6 + (True,))

    def _drawn(self, what: str, options: tuple[T, ...]) -> T:
        return random.Random(f"{what} {self.seed}").choice(options)

    def source(self) -> str:
        """Python code that defines the network as class ``Net``."""
        return _Assembly(self).source()

    def build(self) -> nn.Module:
        """The network, in eval mode, as torch initialises it."""
        namespace: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "math": math, "np": np}
        exec(compile(self.source(), f"<{self}>", "exec"), namespace)
        model: nn.Module = namespace["Net"]()
        return model.eval()

    def example(self, batch: int = 2, size: Shape | None = None) -> Tensor:
        """Inputs for it, in float64 where they are no words."""
        generator = torch.Generator().manual_seed(1)
        size = size or STARTS[self.start]
        if self.start == "words":
            return torch.randint(0, 10, (batch, *size), generator=generator)
        x = torch.randn((batch, *size), generator=generator, dtype=torch.float64)
        return x.transpose(0, 1).contiguous() if self.start == "sequence" else x


class _Assembly:
    """Puts the blocks of a network together."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.random = random.Random(network.seed)
        self.net = Block(self.random, network.flexible)
        self.classes: list[str] = []
        self.made: list[tuple[str, Shape]] = []

    def source(self) -> str:
        shape = self._stem()
        for kind, seed in self.network.blocks:
            shape = self._block(kind, seed, shape)
        self._head(shape)
        return "\n\n\n".join([*self.classes, self.net.source("Net")]) + "\n"

    def _stem(self) -> Shape:
        net, start = self.net, self.network.start
        width = net.width()
        if start == "words":
            net.line(f"x = {net.module(f'nn.Embedding(10, {width})')}(x)")
            return (*STARTS[start], width)
        if start == "sequence":
            net.line("x = x.transpose(0, 1)")
        if start in ("tokens", "sequence"):
            net.line(f"x = {net.linear(12, width)}(x)")
            return 6, width
        if net.flag():
            net.line(f"x = {net.module(f'nn.Conv2d(3, {width}, 4, 4)')}(x).flatten(2).mT")
            return 4, width
        net.line(f"x = {net.module(f'nn.Conv2d(3, {width}, 3, 2, 1)')}(x)")
        return width, 4, 4

    def _block(self, kind: str, seed: int, shape: Shape) -> Shape:
        net = self.net
        same = [name for name, known in self.made if known == shape]
        if same and net.flag(0.15):
            net.line(f"x = x + {net.pick(*same)}(x)")
            return shape
        writers = ON_TOKENS if len(shape) == 2 else ON_IMAGES
        write = writers.get(kind, writers["convolution"])
        if len(shape) == 2 and shape[0] % 2 == 0 and net.flag(0.2):
            half = (shape[0] // 2, shape[1])
            block = Block(random.Random(seed), self.network.flexible)
            if len(outer := write(block, half)) == 2:
                return self._in_windows(self._module(kind, block), half, outer)
        block = Block(random.Random(seed), self.network.flexible)
        outer = write(block, shape)
        if net.flag(0.15) and kind not in ("attention", "in_place"):
            return self._inline(block, outer)
        module = self._module(kind, block)
        if outer != shape:
            net.line(f"x = {module}(x)")
            return outer
        self.made.append((module, shape))
        way = net.pick("plain", "add", "add", "activated", "normed", "scaled")
        if way == "normed" and len(shape) == 2:
            norm = net.module(f"nn.LayerNorm({shape[1]})")
            net.line(f"x = x + {module}({norm}(x))")
        elif way == "scaled" and len(shape) == 2:
            net.line(f"x = x + {net.parameter(shape[1])} * {module}(x)")
        elif way == "activated":
            net.line(f"x = x + {module}(F.relu(x))")
        else:
            net.line(f"x = {module}(x)" if way == "plain" else f"x = x + {module}(x)")
        return outer

    def _module(self, kind: str, block: Block) -> str:
        name = f"{kind.title().replace('_', '')}{len(self.classes)}"
        self.classes.append(block.source(name))
        return self.net.module(f"{name}()")

    def _in_windows(self, module: str, half: Shape, outer: Shape) -> Shape:
        """A block on each half of the tokens by itself, as a larger batch."""
        tokens, width = half
        number = "x.shape[1] // 2" if self.network.flexible else str(tokens)
        parts = f"x.reshape(-1, {number}, {self.net.size(width)})"
        whole = f"x.shape[0], {'-1' if self.network.flexible else 2 * outer[0]}, {outer[1]}"
        self.net.line(f"x = {module}({parts}).reshape({whole})")
        return 2 * outer[0], outer[1]

    def _inline(self, block: Block, outer: Shape) -> Shape:
        """The block's code in the network's own forward, sizes and all."""
        prefix = f"b{len(self.net.init)}_"

        def renamed(line: str) -> str:
            line = line.replace("self.m", f"self.{prefix}m")
            return line.replace("register_buffer('m", f"register_buffer('{prefix}m")

        self.net.helpers.extend(block.helpers)
        self.net.init.extend(map(renamed, block.init))
        self.net.lines.extend(map(renamed, block.lines))
        return outer

    def _head(self, shape: Shape) -> None:
        net = self.net
        if len(shape) == 3:
            width = shape[0]
            net.line(net.pick("x = x.mean((2, 3))", "x = F.adaptive_avg_pool2d(x, 1).flatten(1)"))
        else:
            width = shape[1]
            net.line(net.pick("x = x.mean(1)", "x = x[:, 0]", "x = x.sum(1)", "x = x.amax(dim=1)"))
        if net.flag(0.25):
            self._auxiliary(width)
        net.line(f"x = {net.linear(width, 5)}(x)")

    def _auxiliary(self, width: int) -> None:
        """A head that only training runs, that only training returns, or that nothing returns."""
        net = self.net
        way = net.pick("run", "returned", "never")
        head = net.linear(width, 4)
        if net.flag():
            hidden = net.pick(8, 12)
            layers = f"nn.Linear({width}, {hidden}), nn.ReLU(), nn.Linear({hidden}, 4)"
            head = net.module(f"nn.Sequential({layers})")
        net.line(
            f"aux = {head}(x) if self.training else None" if way == "run" else f"aux = {head}(x)"
        )
        if way != "never":
            net.result = "(x, aux) if self.training else x"
