"""Which layers add to a stream that goes past them, and what the stream is before and after.

Read off one forward: a layer whose output, scaled by parameters or numbers at most, is added to
what an earlier such layer was added to. By then the stream of a pruned model has drifted, and the
layer can be fitted to what brings it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pruners.statistics.calls import Call

_ADDS = frozenset(("add", "add_", "__add__", "__radd__", "__iadd__", "add.Tensor"))
_SCALES = frozenset(("mul", "mul_", "__mul__", "__rmul__", "__imul__", "mul.Tensor"))
_KEEPS = frozenset(("dropout", "dropout.default", "contiguous", "to", "detach", "identity"))

FAINT = 1e-3
"""Share of the mean factor below which a layer is not asked to bring an output back."""


@dataclass(frozen=True)
class Branch:
    """The output of a layer on its way to the stream.

    Attributes
    ----------
    weight : str
        Of the layer.
    scales : tuple of str or float
        Parameters, by name, and numbers that it was multiplied by.
    """

    weight: str
    scales: tuple[str | float, ...] = ()

    def factor(self, parameters: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """What the output is multiplied by, (out,) or a scalar."""
        factor = torch.ones((), dtype=like.dtype, device=like.device)
        for scale in self.scales:
            factor = factor * (parameters[scale] if isinstance(scale, str) else scale)
        return factor


class Streams(TorchFunctionMode):
    """Follows what layers give to where it is added; entered after any `Watch`.

    Parameters
    ----------
    model : nn.Module
    weights : set of str
        Of the linear layers to follow.
    after : callable, optional
        Gets the weight of a layer and the stream once the layer was added.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: set[str],
        after: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.weights, self.after = weights, after
        self.branches: dict[int, Branch] = {}
        self.streams: dict[int, str] = {}
        self.held: list[Tensor] = []
        self.found: dict[str, tuple[str, Branch]] = {}
        """By layer: the one added last before it to the same stream, and its own branch."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the function, and follow its result."""
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            name = getattr(func, "__name__", "")
            self._follow(name, args, kwargs or {}, output)
        return output

    def _follow(self, name: str, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
        if name in ("linear", "linear.default"):
            weight = self.names.get(id(args[1] if len(args) > 1 else kwargs.get("weight")))
            if weight in self.weights:
                self._hold(self.branches, output, Branch(weight))
        elif name in _KEEPS and args:
            for known in (self.branches, self.streams):
                if id(args[0]) in known:
                    self._hold(known, output, known[id(args[0])])
        elif name in _SCALES and len(args) == 2:
            self._scaled(args, output)
        elif name in _ADDS and len(args) == 2 and not kwargs:
            self._added(args, output)

    def _hold(self, known: dict[int, Any], output: Tensor, what: Any) -> None:
        self.held.append(output)  # or another would get its number
        known[id(output)] = what

    def _scaled(self, args: tuple[Any, ...], output: Tensor) -> None:
        for branch, scale in (args, args[::-1]):
            known = self.branches.get(id(branch))
            name = scale if isinstance(scale, (int, float)) else self.names.get(id(scale))
            if known is not None and name is not None:
                self._hold(self.branches, output, Branch(known.weight, (*known.scales, name)))

    def _added(self, args: tuple[Any, ...], output: Tensor) -> None:
        for stream, added in (args, args[::-1]):
            branch = self.branches.get(id(added))
            if branch is None or id(stream) in self.branches or not isinstance(stream, Tensor):
                continue
            if stream.shape != output.shape:
                continue
            if id(stream) in self.streams:
                self.found[branch.weight] = self.streams[id(stream)], branch
            self._hold(self.streams, output, branch.weight)
            if self.after is not None:
                self.after(branch.weight, output)


class Drift:
    """How far the stream of the pruned model is from that of the dense one, on one batch.

    Parameters
    ----------
    small : nn.Module
    found : mapping
        See `Streams.found`.
    """

    def __init__(self, small: nn.Module, found: Mapping[str, tuple[str, Branch]]) -> None:
        self.found = found
        self.layers = {weight for pair in found.items() for weight in (pair[0], pair[1][0])}
        self.parameters = dict(small.named_parameters())
        self.now: dict[str, Tensor] = {}

    def lacking(self, call: Call, gave: Tensor) -> Tensor:
        """What the output of a layer would have to have besides, to bring the stream back.

        Parameters
        ----------
        call : Call
        gave : Tensor (samples, places, out)
            What the layer of the dense model gives.
        """
        before, branch = self.found.get(call.weight, ("", None))
        if branch is None or before not in self.now:
            return torch.zeros((), dtype=gave.dtype, device=gave.device)
        factor = branch.factor(self.parameters, gave)
        faint = factor.abs() < FAINT * factor.abs().mean()
        inverse = torch.where(faint, 0.0, 1 / torch.where(faint, 1.0, factor))
        return call.flat(self.now[before]) * inverse
