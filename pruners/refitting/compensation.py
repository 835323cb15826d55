"""Refits the layers from the first cut on, so that they give what they gave before it.

Over unlabelled samples the dense and the pruned model run side by side, batch by batch; of each
layer only sums are kept, so that memory does not grow with the samples. No label is read, and
nothing is trained.

References
----------
Hassibi and Stork: "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS 1992
(the update of the weights that stay is the same least squares). He, Zhang, Sun: "Channel Pruning
for Accelerating Very Deep Neural Networks", ICCV 2017. Ling et al.: "SlimGPT", NeurIPS 2024.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depgraph import Plan
from pruners.refitting.fit import Fit
from pruners.refitting.recalibration import Observed, Recalibration, WatchNorms
from pruners.refitting.residual import Branch, Drift, Streams
from pruners.refitting.teacher import Teacher, stream_after
from pruners.registry import Batch
from pruners.statistics.calls import Call, Watch, readable, run
from pruners.statistics.gradient import evaluating

DAMPING = 0.01
"""Share of the mean diagonal that holds the refitted weights near those they had."""

GROWTH = 1.25
"""A layer is solved again when the number of its places has grown by this factor."""

ROUNDING = 16
"""Smallest steps of the type, of the largest output, that two outputs may be apart by rounding."""

PLACES = 16
"""Places for each input that it takes to refit a layer that lost none."""


@torch.no_grad()
def compensate(
    dense: nn.Module,
    small: nn.Module,
    plan: Plan,
    batches: Iterable[Batch],
    damping: float = DAMPING,
    what: Literal["all", "readers", "means"] = "all",
) -> list[str]:
    """Refit, in place, every linear layer and convolution that the cut reaches, and batch norms.

    Parameters
    ----------
    dense : nn.Module
        The model that the plan was applied to; stays as it is.
    small : nn.Module
        What came of it.
    plan : Plan
    batches : iterable of (inputs, targets)
        Gone through a batch at a time, twice where there are batch norms. The targets are not read.
    damping : float
        ``min_D sum_t |y_t - (W + D) x_t|^2 + damping * mean(x^2) * samples * |D|^2``. Directions
        that the samples say nothing of keep their weights.
    what : "all", "readers" or "means"
        ``"readers"``: the layers that lost inputs alone, each to what it gave. ``"means"``: of
        these, leave the weights as they are, and move the biases by what is lacking of the means.

    Returns
    -------
    list of str
        Weights that were refitted, in the order of the forward.

    Notes
    -----
    One pass, in which both models run side by side. Each layer is refitted when it is reached, to
    the sums over all samples so far, and the layers after it see what it then gives: what it
    cannot make good they can. It is solved anew only when its sums have grown by a part, so that
    this takes little beside the forwards. Of a single batch it is the least squares of each layer
    after those before it, exactly; of many, the first samples were seen through layers that were
    fitted to fewer.

    A layer that lost no input is refitted too where what it reads has changed: it makes good what
    those before it could not. Only with `PLACES` for each of its inputs, though: of fewer (a head
    that reads one token of each sample) it learns the samples by heart.

    A layer whose output is added to a stream that was added to before (`refitting.residual`) is
    fitted to what brings the stream to where the dense model's is.

    Sums take ``O(in (in + out))`` numbers in float64 for each layer. Biases are part of the least
    squares, where they are parameters. Running statistics of batch norms follow what reaches them
    (`refitting.recalibration`), for which there is a second pass; other norms have none. A layer
    that is applied several times in one forward is left as it is, and so are grouped convolutions:
    their columns have no sum of their own to be fitted to.
    """
    known = dict(small.named_parameters())
    layers = {name for name, dims in plan.kept.items() if 1 in dims and name in known}
    losing = {name for name in layers if _loses(plan, name)}
    with evaluating(dense), evaluating(small):
        first = _first_sample(next(iter(batches))[0])
        once, norms = _called_once(dense, layers if what == "all" else losing, first)
        added = _added(dense, once, first) if what == "all" else {}
        by = None if what == "means" else damping
        refit = _Refit(dense, small, plan, once, losing, added, by)
        original: dict[str, tuple[Tensor, Tensor]] = {}
        refit.go_through(batches, Recalibration(plan, norms, original))
        for layer in refit.layers.values():
            if layer.is_told:
                layer.solve(refit.damping)
        if norms:
            refit.once, refit.teacher.streams = set(), set()
            refit.go_through(batches, Recalibration(plan, norms, original))
    return [name for name, layer in refit.layers.items() if layer.is_told]


def _loses(plan: Plan, name: str) -> bool:
    return _mentions(plan.axes[name][1], set(plan.kept_units))


def _mentions(spec: Any, names: set[str]) -> bool:
    if isinstance(spec, list):
        return any(_mentions(item, names) for item in spec[1:])
    return spec in names


def _first_sample(inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x[:1] for x in (inputs if isinstance(inputs, (tuple, list)) else (inputs,)))


def _added(
    model: nn.Module, weights: set[str], inputs: tuple[Tensor, ...]
) -> dict[str, tuple[str, Branch]]:
    """Layers that are added to a stream, with the one that was added to it before."""
    with Streams(model, weights) as streams:
        run(model, inputs)
    return streams.found


def _called_once(model: nn.Module, weights: set[str], inputs: Any) -> tuple[set[str], set[str]]:
    """Layers that can be refitted, and batch norms, by weight and by buffer of means."""
    layers: Counter[str] = Counter()
    norms: Counter[str] = Counter()

    def count(call: Call, output: Tensor) -> Tensor:
        layers[call.weight] += 1 if readable(call) else 2
        return output

    def count_norm(name: str, seen: Observed, mean: Tensor, variance: Tensor) -> None:
        norms[name] += 1

    with WatchNorms(model, count_norm), Watch(model, weights, count):
        run(model, inputs)
    once = [{name for name, times in found.items() if times == 1} for found in (layers, norms)]
    return once[0], once[1]


def _alike(output: Tensor, gave: Tensor) -> bool:
    """Whether two outputs differ by rounding at most."""
    least = ROUNDING * torch.finfo(output.dtype).eps
    return bool((output - gave).abs().max() <= least * gave.abs().max())


def _row_factors(plan: Plan) -> dict[str, Tensor]:
    """By what the cut multiplied the rows of weights, in the order of the original."""
    found: dict[str, Tensor] = {}
    for name, mask, factor in plan.factors:
        rows = torch.where(mask.flatten(1).all(1), factor, 1.0) if mask.dim() > 1 else None
        if rows is not None:
            found[name] = found[name] * rows if name in found else rows
    return found


class _Refit:
    """The layers of the pruned model, refitted to what those of the dense one give."""

    def __init__(
        self,
        dense: nn.Module,
        small: nn.Module,
        plan: Plan,
        once: set[str],
        losing: set[str],
        added: Mapping[str, tuple[str, Branch]],
        damping: float | None,
    ) -> None:
        self.small, self.plan, self.once, self.damping = small, plan, once, damping
        self.losing = losing
        self.drift = Drift(small, added)
        self.teacher = Teacher(dense, once, self.drift.layers)
        self.factors: Mapping[str, Tensor] = _row_factors(
            vars(small).get("depgraph_plans", [plan])[-1]
        )
        self.layers: dict[str, _Layer] = {}

    def go_through(self, batches: Iterable[Batch], norms: Recalibration) -> None:
        """One pass over the samples, a batch at a time."""

        def after(call: Call, output: Tensor) -> Tensor:
            gave = self._gave(call)
            layer = self._layer(call)
            if not layer.fit.count and not layer.loses and _alike(call.flat(output), gave):
                self.once.discard(call.weight)  # the cut does not reach it
                return output
            wanted = gave + self.drift.lacking(call, gave)
            if layer.bias is None and call.bias is not None:
                wanted = wanted - call.bias
            layer.fit.add(call.rows.flatten(0, 1), wanted.flatten(0, 1))
            if layer.fit.count < GROWTH * layer.solved_at or not layer.is_told:
                return output
            layer.solve(self.damping)
            if call.convolution is None:
                return F.linear(call.inputs, call.parameter, call.bias)
            flat = call.rows @ call.parameter.flatten(1).T + (0 if call.bias is None else call.bias)
            return flat.mT.reshape(output.shape)

        def before(name: str, seen: Observed, mean: Tensor, variance: Tensor) -> None:
            if name in norms.names:
                norms(name, seen, self.teacher.next(name), mean, variance)

        def added(name: str, stream: Tensor) -> None:
            rows = self.plan.kept[name].get(0)
            was = self.teacher.next(stream_after(name))
            was = was if rows is None else was[..., rows.to(was.device)]
            self.drift.now[name] = was - stream

        for inputs, _ in batches:
            self.drift.now.clear()
            with (
                self.teacher.running(inputs),
                WatchNorms(self.small, before),
                Watch(self.small, self.once, after),
                Streams(self.small, self.teacher.streams, added),
            ):
                run(self.small, inputs)

    def _gave(self, call: Call) -> Tensor:
        """What the dense model's layer gives in the rows that stay: (samples, places, out)."""
        gave = call.flat(self.teacher.next(call.weight))
        if call.weight in self.factors:
            gave = gave * self.factors[call.weight].to(gave)
        rows = self.plan.kept[call.weight].get(0)
        return gave if rows is None else gave[..., rows.to(gave.device)]

    def _layer(self, call: Call) -> _Layer:
        if call.weight not in self.layers:
            bias = call.bias if isinstance(call.bias, nn.Parameter) else None
            loses = call.weight in self.losing
            self.layers[call.weight] = _Layer(call.weight, call.parameter, bias, loses)
        return self.layers[call.weight]


class _Layer:
    """A layer with its sums, and what it was before any refit."""

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None, loses: bool) -> None:
        self.name, self.weight, self.bias, self.loses = name, weight, bias, loses
        self.before = weight.flatten(1).clone(), None if bias is None else bias.clone()
        self.fit = Fit(name)
        self.solved_at = 0

    @property
    def is_told(self) -> bool:
        """Whether enough was seen of what it reads."""
        return self.loses or self.fit.count >= PLACES * self.before[0].shape[1]

    def solve(self, damping: float | None) -> None:
        """Make it what is best for the places so far; None: its bias alone."""
        if damping is None:
            if self.bias is not None:
                self.bias.copy_(self.fit.shift(self.before[0]))
            self.solved_at = self.fit.count
            return
        weight, bias = self.fit.solve(*self.before, damping)
        self.weight.copy_(weight.reshape(self.weight.shape))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        self.solved_at = self.fit.count
