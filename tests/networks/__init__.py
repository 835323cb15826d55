"""Random networks for property tests: blocks of many kinds, as source that builds them.

A network is a list of block kinds and seeds, so that leaving one out, or a smaller seed, is a
simpler network: hypothesis and `benchmarks.property` shrink failures this way.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks import attention, images, tokens, unusual
from tests.networks.writer import Block, Shape, Writer

STARTS: dict[str, Shape] = {"tokens": (6, 12), "image": (3, 8, 8), "words": (6,)}
"""Shape of the input, without the batch."""

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
        Decides about the stem, the head and how blocks are put together.
    """

    start: str
    blocks: tuple[tuple[str, int], ...]
    seed: int = 0

    @classmethod
    def random(cls, seed: int, longest: int = 6) -> Network:
        """The network of that seed."""
        generator = random.Random(seed)
        number = generator.randint(1, longest)
        blocks = tuple((generator.choice(KINDS), generator.randrange(2**16)) for _ in range(number))
        return cls(generator.choice(list(STARTS)), blocks, generator.randrange(2**16))

    def source(self) -> str:
        """Python code that defines the network as class ``Net``."""
        return _Assembly(self).source()

    def build(self) -> nn.Module:
        """The network, in eval mode, as torch initialises it."""
        namespace: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
        exec(compile(self.source(), f"<{self}>", "exec"), namespace)
        model: nn.Module = namespace["Net"]()
        return model.eval()

    def example(self, batch: int = 2) -> Tensor:
        """Inputs for it."""
        generator = torch.Generator().manual_seed(1)
        if self.start == "words":
            return torch.randint(0, 10, (batch, *STARTS["words"]), generator=generator)
        size = (batch, *STARTS[self.start])
        return torch.randn(size, generator=generator, dtype=torch.float64)


class _Assembly:
    """Puts the blocks of a network together."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.random = random.Random(network.seed)
        self.net = Block(self.random)
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
        if start == "tokens":
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
            block = Block(random.Random(seed))
            if len(outer := write(block, half)) == 2:
                return self._in_windows(self._module(kind, block), half, outer)
        block = Block(random.Random(seed))
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
        parts = f"x.reshape(-1, {tokens}, {self.net.size(width)})"
        whole = f"x.shape[0], {2 * outer[0]}, {outer[1]}"
        self.net.line(f"x = {module}({parts}).reshape({whole})")
        return 2 * outer[0], outer[1]

    def _inline(self, block: Block, outer: Shape) -> Shape:
        """The block's code in the network's own forward, sizes and all."""
        prefix = f"b{len(self.net.init)}_"

        def renamed(line: str) -> str:
            line = line.replace("self.m", f"self.{prefix}m")
            return line.replace("register_buffer('m", f"register_buffer('{prefix}m")

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
        net.line(f"x = {net.linear(width, 5)}(x)")
