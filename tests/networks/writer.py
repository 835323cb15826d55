"""Writes the source of one block of a random network, each choice drawn from a seeded generator.

Source rather than objects: a failing network is printed as the code that builds it, and sizes can
be spelled as literals, attributes or expressions, as people write them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
Shape = tuple[int, ...]
"""Without the batch: (tokens, channels), or (channels, height, width)."""

MOST_TOKENS = 64
"""Rows of a table of positions, of which as many are used as there are tokens."""

WIDTHS = (8, 12, 16, 24, 32, 48)
ACTIVATIONS = (
    "F.relu({})",
    "F.gelu({})",
    "F.silu({})",
    "torch.tanh({})",
    "F.leaky_relu({}, 0.1)",
    "{}.sigmoid()",
    "F.hardswish({})",
    "F.elu({})",
    "{}.relu_()",
    "F.softplus({})",
    "{}.clamp(-1.0, 2.0)",
    "{}.square()",
)


@dataclass
class Block:
    """One module class in the making.

    Attributes
    ----------
    random : random.Random
    flexible : bool
        Whether token counts and image sizes are read from the input rather than written down.
    init, lines : list of str
        Statements of ``__init__`` and ``forward``.
    helpers : list of str
        Classes that it uses.
    result : str
        What ``forward`` returns.
    """

    random: random.Random
    flexible: bool = False
    init: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    helpers: list[str] = field(default_factory=list)
    result: str = "x"
    _names: int = 0

    def pick(self, *options: T) -> T:
        """One of the options."""
        return self.random.choice(options)

    def flag(self, chance: float = 0.5) -> bool:
        """True with that chance."""
        return self.random.random() < chance

    def width(self) -> int:
        """A number of channels."""
        return self.pick(*WIDTHS)

    def divisor(self, number: int, *options: int) -> int:
        """One of the options that divide a number; 1 where none does."""
        return self.pick(*([n for n in options if number % n == 0] or [1]))

    def module(self, code: str) -> str:
        """Register a module (or any attribute) and return how the forward names it."""
        self._names += 1
        self.init.append(f"self.m{self._names} = {code}")
        return f"self.m{self._names}"

    def parameter(self, *shape: int) -> str:
        """Register a parameter."""
        return self.module(f"nn.Parameter(torch.zeros{shape})")

    def buffer(self, *shape: int) -> str:
        """Register a buffer."""
        self._names += 1
        self.init.append(f"self.register_buffer('m{self._names}', torch.zeros{shape})")
        return f"self.m{self._names}"

    def linear(self, inner: int, outer: int) -> str:
        """Register a linear layer, with or without bias."""
        return self.module(f"nn.Linear({inner}, {outer}, bias={self.flag(0.8)})")

    def size(self, value: int, expression: str | None = None) -> str:
        """A size as a literal, an attribute, or an expression that has its value."""
        spelled = self.pick("literal", "attribute", "expression")
        if spelled == "expression" and expression is not None:
            return expression
        return self.module(str(value)) if spelled == "attribute" else str(value)

    def tokens(self, number: int) -> str:
        """The number of tokens that come in."""
        if not self.flexible:
            return str(number)
        if "N = x.shape[1]" not in self.lines:
            self.lines.insert(0, "N = x.shape[1]")
        return "N"

    def positions(self, high: int, wide: int) -> tuple[str, str]:
        """Rows and columns of the image that comes in."""
        if not self.flexible:
            return str(high), str(wide)
        if "H, W = x.shape[2:]" not in self.lines:
            self.lines.insert(0, "H, W = x.shape[2:]")
        return "H", "W"

    def line(self, code: str) -> None:
        """Add a statement to the forward."""
        self.lines.append(code)

    def activation(self, name: str) -> str:
        """A nonlinearity applied to a variable."""
        return self.pick(*ACTIVATIONS).format(name)

    def source(self, name: str) -> str:
        """The class."""
        return "\n".join(
            [
                *self.helpers,
                f"class {name}(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *(f"        {line}" for line in self.init),
                "",
                "    def forward(self, x):",
                *(f"        {line}" for line in self.lines),
                f"        return {self.result}",
            ]
        )


Writer = Callable[[Block, Shape], Shape]
"""Writes a block for an input shape and returns the shape of its result."""
