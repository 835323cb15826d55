"""Second moments of what layers read and of the gradients that reach what they write.

With ``x_t`` the input and ``g_t`` the gradient of the loss at place ``t`` of a sample, a change
``D`` of the weights costs about ``1/2 sum_t (g_t . D x_t)^2``: the Gauss-Newton term, places taken
one by one. It is kept as two factors, as in K-FAC, but with every place weighted by its gradient,
since a place whose gradient is zero (patches in the last block of a model that reads the class
token) may change freely.

References
----------
Martens, Grosse: "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depgraph.exporting.places import Places
from pruners.registry import Batch
from pruners.statistics.calls import Call, Watch, first_tensor, readable, run
from pruners.statistics.finite import check_outputs, check_seen
from pruners.statistics.gradient import evaluating
from pruners.statistics.solving import TINY, roots

EVENNESS = 0.1
"""Share of the mean weight that each place has besides its own."""

LEAST = 1e-20
"""Weight of every place besides: where no gradient comes (a head of zeros), all are alike."""

Tap = Callable[[Call, Tensor, Tensor], None]
"""What to do with a call, its output and the gradient of the output."""


@dataclass
class Moments:
    """Of one layer; sums over places, means over samples.

    Attributes
    ----------
    inputs : Tensor (in + 1, in + 1)
        ``sum_t w_t x_t x_t^T``, ``x_t`` ending with a one, for the bias.
    gradients : Tensor (out, out) or (out,)
        ``G = sum_t g_t g_t^T / sum_t |g_t|^2``, of trace one; the diagonal if `through` is there.
    through : Tensor (in, in), optional
        ``W^T G W`` for the layer's weight W, where that is smaller.
    """

    inputs: Tensor
    gradients: Tensor
    through: Tensor | None = None

    @property
    def spread(self) -> Tensor:
        """The diagonal of G (out,)."""
        return self.gradients if self.gradients.dim() == 1 else self.gradients.diagonal()

    def weighted(self, weight: Tensor) -> Tensor:
        """What has the Gram matrix ``W^T G W``: (out, in), or (in, in).

        Parameters
        ----------
        weight : Tensor (out, in)
            That of the layer.
        """
        if self.through is None:
            return roots(self.gradients)[0] @ weight.double()
        if float(self.spread.sum()) <= TINY:  # no gradient came: as if all outputs counted alike
            return weight.double()
        return roots(self.through)[0] if float(self.through.trace()) > TINY else self.through


def layer_moments(
    model: nn.Module,
    weights: Iterable[str],
    batches: Iterable[Batch],
    seed: int = 0,
    of_tokens: bool = False,
) -> dict[str, Moments]:
    """Moments of linear layers and convolutions, by the name of the weight.

    Parameters
    ----------
    model : nn.Module
        Stays as it is.
    weights : iterable of str
        Those the model never calls as a layer are left out of the result.
    batches : iterable of (inputs, targets)
    seed : int
        Of the labels, see `watch_gradients`.
    of_tokens : bool
        See `watch_gradients`.

    Returns
    -------
    dict of str to Moments
        In float64 on the device of the model.
    """
    sums: dict[str, list[Tensor]] = {}

    def tap(call: Call, output: Tensor, gradient: Tensor) -> None:
        x, g = call.rows, call.flat(gradient)
        weights = place_weights(g).flatten()
        x, g = F.pad(x, (0, 1), value=1.0).flatten(0, 1), g.flatten(0, 1)
        seen = [weighted_moment(x, weights), g.float().square().sum(0).double()]
        if g.shape[1] < x.shape[1]:
            seen[1] = weighted_moment(g)
        else:  # a layer from few to many: its inputs' gradients say the same in less
            seen.append(weighted_moment(g @ call.parameter.detach().flatten(1)))
        known = sums.setdefault(call.weight, seen)
        if known is not seen:
            for total, more in zip(known, seen, strict=True):
                total += more

    count = watch_gradients(model, set(weights), batches, tap, seed, of_tokens)
    for name, seen in sums.items():
        check_seen(name, *seen)
    found = {}
    for name, (inputs, gradients, *through) in sums.items():
        spread = gradients if gradients.dim() == 1 else gradients.diagonal()
        size = spread.sum().clamp_min(1e-30)
        found[name] = Moments(inputs / count, gradients / size, *(x / size for x in through))
    return found


def place_weights(gradient: Tensor) -> Tensor:
    """Squared length of each place's gradient (..., places, d), evened out a little."""
    squares = gradient.float().square().sum(-1)
    return squares + EVENNESS * squares.mean() + LEAST


def weighted_moment(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum_t w_t x_t x_t^T`` of (t, d) rows, in float64."""
    rows = rows.float()
    other = rows if weights is None else rows * weights[:, None]
    return (other.T @ rows).double()


def watch_gradients(
    model: nn.Module,
    weights: set[str],
    batches: Iterable[Batch],
    tap: Tap,
    seed: int = 0,
    of_tokens: bool = False,
) -> int:
    """Run the model forward and backward, and look at each layer with its gradient.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode meanwhile; no ``.grad`` is touched.
    weights : set of str
    batches : iterable of (inputs, targets)
        The targets are not read: labels are drawn from what the model predicts, for which the
        squared gradient is the Gauss-Newton matrix in expectation, however well it is trained.
    tap : callable
    seed : int
        Of the labels, or directions.
    of_tokens : bool
        The gradient is that of the tokens before the head in a direction drawn at random, for which
        its square is the Gauss-Newton matrix of their squared distance, in expectation. The head
        and its classes have no part in it.

    Returns
    -------
    int
        Number of samples.
    """
    generator = torch.Generator().manual_seed(seed)
    count = 0
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        for inputs, targets in batches:
            _one_batch(model, weights, inputs, tap, generator, of_tokens)
            count += len(targets)
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
    return count


def _one_batch(
    model: nn.Module,
    weights: set[str],
    inputs: object,
    tap: Tap,
    generator: torch.Generator,
    of_tokens: bool,
) -> None:
    def after(call: Call, output: Tensor) -> Tensor:
        if readable(call):
            if not output.requires_grad:
                output.requires_grad_()
            seen = output.detach()  # a hook that holds its own tensor would never be freed
            output.register_hook(lambda gradient: tap(call, seen, gradient))
        return output

    with evaluating(model), torch.enable_grad():
        with Places(model) as places, Watch(model, weights, after):
            output = first_tensor(run(model, inputs))
            tokens = output if places.last is None else places.last
        loss = _of_tokens(tokens, generator) if of_tokens else _of_labels(output, generator)
        if loss.requires_grad:
            loss.backward()


def _of_labels(output: Tensor, generator: torch.Generator) -> Tensor:
    """The cross-entropy of labels that are drawn from what is predicted."""
    logits = output.flatten(0, -2).float()
    shares = logits.detach().softmax(-1).cpu()
    check_outputs(shares)
    labels = torch.multinomial(shares, 1, generator=generator).flatten().to(logits.device)
    return F.cross_entropy(logits, labels, reduction="sum")


def _of_tokens(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens in a direction drawn at random, in terms of each sample's size."""
    tokens = tokens.float()
    check_outputs(tokens.detach())
    direction = torch.randn(tokens.shape, generator=generator).to(tokens.device)
    size = tokens.detach().flatten(1).square().mean(1).sqrt().clamp_min(1e-30)
    return ((tokens * direction).flatten(1).sum(1) / size).sum()
