"""Refits the layers that read what is left, so that they give what they gave before the cut.

One pass over unlabelled samples: the dense and the pruned model run side by side, and each layer
of the pruned one is refitted at the moment it is reached, on the inputs that the refitted layers
before it make. No label is read, and nothing is trained.

References
----------
Hassibi and Stork: "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS 1992
(the update of the weights that stay is the same least squares). He, Zhang, Sun: "Channel Pruning
for Accelerating Very Deep Neural Networks", ICCV 2017. Ling et al.: "SlimGPT", NeurIPS 2024.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from queue import Queue
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depgraph import DepgraphError, Plan
from pruners._calls import Call, Watch, readable, run
from pruners._finite import check_seen
from pruners._solving import solve_moments
from pruners.gradient import evaluating
from pruners.metrics import Batch
from pruners.recalibration import Recalibration, WatchNorms, observe_norms

DAMPING = 0.01
"""Share of the mean diagonal that holds the refitted weights near those they had."""

ROUNDING = 1e-9
"""Share of the mean square of the inputs below which their spread is taken for rounding."""

ROWS = 1 << 13
"""Places whose products are added up in float32, before they go to the sum in float64."""


@torch.no_grad()
def compensate(
    dense: nn.Module,
    small: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    damping: float = DAMPING,
) -> list[str]:
    """Refit, in place, every linear layer and convolution that lost inputs, and batch norms.

    Parameters
    ----------
    dense : nn.Module
        The model that the plan was applied to; stays as it is.
    small : nn.Module
        What came of it.
    plan : Plan
    batches : sequence of (inputs, targets)
        The targets are not read.
    damping : float
        ``min_D sum_t |y_t - (W + D) x_t|^2 + damping * mean(x^2) * samples * |D|^2``. Directions
        that the samples say nothing of keep their weights.

    Returns
    -------
    list of str
        Weights that were refitted, in the order of the forward.

    Notes
    -----
    Biases are part of the least squares, where they are parameters. Running statistics of batch
    norms follow what reaches them (`pruners.recalibration`); other norms have none. A layer that is
    applied several times in one forward is left as it is, and so are grouped convolutions: their
    columns have no sum of their own to be fitted to.
    """
    losing = {
        name
        for name, dims in plan.kept.items()
        if 1 in dims and _loses(plan, name) and name in dict(small.named_parameters())
    }
    inputs = _joined(batches)
    applied = vars(small).get("depgraph_plans", [plan])[-1]
    refit = _Refit(plan, damping, _row_factors(applied))
    with evaluating(dense), evaluating(small):
        norms = Recalibration(plan, observe_norms(dense, lambda: run(dense, inputs)))
        once = _called_once(dense, losing, batches[0][0])
        wanted = Queue(maxsize=1)  # type: ignore[var-annotated]
        teacher = _Teacher(dense, once, inputs, wanted)
        teacher.start()
        try:
            with (
                WatchNorms(small, norms),
                Watch(
                    small, once, lambda call, output: refit(call, output, teacher.next(call.weight))
                ),
            ):
                run(small, inputs)
        finally:
            teacher.stop()
    return refit.done


def _loses(plan: Plan, name: str) -> bool:
    return _mentions(plan.axes[name][1], set(plan.kept_units))


def _mentions(spec: Any, names: set[str]) -> bool:
    if isinstance(spec, list):
        return any(_mentions(item, names) for item in spec[1:])
    return spec in names


def _joined(batches: Sequence[Batch]) -> tuple[Tensor, ...]:
    """All inputs as one batch: a layer has to be refitted before the next one is reached."""
    each = [tuple(x) if isinstance(x, (tuple, list)) else (x,) for x, _ in batches]
    return tuple(torch.cat(parts) for parts in zip(*each, strict=True))


def _called_once(model: nn.Module, weights: set[str], inputs: Any) -> set[str]:
    counts = dict.fromkeys(weights, 0)

    def count(call: Call, output: Tensor) -> Tensor:
        counts[call.weight] += 1 if readable(call) else 2
        return output

    first = tuple(x[:1] for x in (inputs if isinstance(inputs, (tuple, list)) else (inputs,)))
    with Watch(model, weights, count):
        run(model, first)
    return {name for name, times in counts.items() if times == 1}


def _row_factors(plan: Plan) -> dict[str, Tensor]:
    """By what the cut multiplied the rows of weights, in the order of the original."""
    found: dict[str, Tensor] = {}
    for name, mask, factor in plan.factors:
        rows = torch.where(mask.flatten(1).all(1), factor, 1.0) if mask.dim() > 1 else None
        if rows is not None:
            found[name] = found[name] * rows if name in found else rows
    return found


class _Refit:
    def __init__(self, plan: Plan, damping: float, factors: Mapping[str, Tensor]) -> None:
        self.plan = plan
        self.factors = factors
        self.damping = damping
        self.done: list[str] = []

    def __call__(self, call: Call, output: Tensor, wanted: Tensor) -> Tensor:
        rows = self.plan.kept[call.weight].get(0)
        y = call.flat(wanted).flatten(0, 1)
        if call.weight in self.factors:
            y = y * self.factors[call.weight].to(y)
        y = y if rows is None else y[:, rows.to(y.device)]
        x = call.rows.flatten(0, 1)
        bias = call.bias if isinstance(call.bias, nn.Parameter) else None
        given = 0 if call.bias is None or bias is not None else call.bias
        weight, offset = least_squares(
            x, y - given, call.parameter.flatten(1), bias, self.damping, call.weight
        )
        call.parameter.copy_(weight.reshape(call.parameter.shape))
        if bias is not None and offset is not None:
            bias.copy_(offset)
        self.done.append(call.weight)
        if call.convolution is None:
            return F.linear(call.inputs, call.parameter, call.bias)
        flat = call.rows @ call.parameter.flatten(1).T + (0 if call.bias is None else call.bias)
        return flat.transpose(1, 2).reshape(output.shape)


def least_squares(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, damping: float, name: str = "weight"
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias nearest to the given ones with ``x weight^T + bias`` nearest to y.

    Parameters
    ----------
    x, y : Tensor (places, in), (places, out)
    weight : Tensor (out, in)
    bias : Tensor (out,) or None
        None: the layer has none, and gets none.
    damping : float
        See `compensate`.
    name : str
        Of the weight, for the error.

    Returns
    -------
    weight : Tensor
    bias : Tensor or None

    Raises
    ------
    DepgraphError
        When x or y is not finite, or its squares are not.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    x, y, weight = x.to(exact), y.to(exact), weight.to(exact)
    mean_x = x.mean(0) if bias is not None else x.new_zeros(x.shape[1])
    mean_y = y.mean(0) if bias is not None else y.new_zeros(y.shape[1])
    moment = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    cross = x.new_zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for rows, wanted in zip(x.split(ROWS), y.split(ROWS), strict=True):
        rows, wanted = (
            rows - mean_x,
            wanted - mean_y,
        )  # not afterwards: it would leave rounding only
        moment += rows.T @ rows
        cross += rows.T @ (wanted - rows @ weight.T)
    check_seen(name, moment, cross)
    spread = moment.diagonal().mean()
    size = spread + len(x) * mean_x.double().square().mean()
    change = solve_moments(moment, cross, damping * spread + (ROUNDING * size).clamp_min(1e-30))
    weight = weight + change.T.to(exact)
    return weight, None if bias is None else mean_y - weight @ mean_x


class _Teacher:
    """Runs the dense model in a thread of its own and hands over one layer's output at a time."""

    def __init__(
        self, model: nn.Module, weights: set[str], inputs: tuple[Tensor, ...], queue: Queue[Any]
    ) -> None:
        self.queue = queue
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(model, weights, inputs), daemon=True)

    def start(self) -> None:
        self.thread.start()

    def next(self, weight: str) -> Tensor:
        """The output of a layer of the dense model, which calls its layers in the same order."""
        while True:
            name, value = self.queue.get()
            if isinstance(value, Exception):
                raise value
            if name == weight:
                return value

    def stop(self) -> None:
        """End the thread, in the middle of its forward if need be."""
        self.stopped.set()
        while self.thread.is_alive():
            if not self.queue.empty():
                self.queue.get()
            self.thread.join(timeout=0.01)

    def _run(self, model: nn.Module, weights: set[str], inputs: tuple[Tensor, ...]) -> None:
        def after(call: Call, output: Tensor) -> Tensor:
            if self.stopped.is_set():
                raise _Stopped
            self.queue.put((call.weight, output))
            return output

        try:
            with torch.no_grad(), Watch(model, weights, after):
                run(model, inputs)
        except _Stopped:
            return
        except Exception as error:  # noqa: BLE001  (raised again where it is waited for)
            self.queue.put(("", error))
        else:
            self.queue.put(
                ("", DepgraphError("the pruned model calls its layers in another order"))
            )


class _Stopped(DepgraphError):
    """The pruned model needs no more."""
