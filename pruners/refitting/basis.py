"""Another basis for the head dims of each head, in which a shared cut is a cut of its own.

A view makes all heads lose equally many dims at the same places, q and k the same as v. But any
invertible matrix between v and the output layer, and between q and k, leaves the model what it is.
So each head's v dims, and its q and k dims, are turned to principal directions in falling order of
importance: the first n of every head are then the n best directions of that head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from depgraph import DependencyGraph
from pruners.registry import Batch
from pruners.statistics.attention import Attention, Part, find_attentions
from pruners.statistics.calls import Call
from pruners.statistics.finite import check_seen
from pruners.statistics.moments import place_weights, watch_gradients
from pruners.statistics.solving import TINY, roots

RIDGE = 1e-3
"""Share of the mean variance that is added to each direction, so that none is without."""


@torch.no_grad()
def align_head_dims(
    model: nn.Module,
    graph: DependencyGraph,
    batches: Iterable[Batch],
    seed: int = 0,
) -> list[Attention]:
    """Turn the head dims of every attention of a model to principal directions, in place.

    Parameters
    ----------
    model : nn.Module
        Computes the same as before, up to rounding.
    graph : DependencyGraph
        Of this model.
    batches : iterable of (inputs, targets)
        What the directions are principal for.
    seed : int
        See `pruners.statistics.moments.watch_gradients`.

    Returns
    -------
    list of Attention
        Those that were turned. Left out: see `statistics.attention`, and those whose
        layers run within one function of torch (`nn.MultiheadAttention`), where they are not seen.

    Notes
    -----
    For v with output layer ``P``: the best n directions are the first n of the right singular
    vectors of ``G^1/2 P C^1/2``, with ``C`` the covariance of what the head gives and ``G`` the
    second moment of the gradient; made orthonormal one after the other, so that the weights keep
    their scale. For q and k: ``q . k`` at random pairs loses least when the last singular
    directions of ``Cq^1/2 Ck^1/2`` go; up to a factor for the whole head, which leaves their
    weights the scale that they had, both get the same spread in every direction. A part of k that
    all tokens of an image share does not change a softmax and is left out of ``Ck``.
    """
    attentions = find_attentions(graph)
    statistics = _Statistics(model, attentions)
    statistics.count = watch_gradients(model, statistics.weights, batches, statistics.tap, seed)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    attentions = [attention for attention in attentions if statistics.saw(attention)]
    for (weight, _), seen in statistics.sums.items():
        check_seen(weight, seen)
    for attention in attentions:
        output = tensors[attention.output.weight]
        turn = value_turn(output, attention.output.index, *statistics.value(attention))
        _turn_rows(tensors, attention.value, turn)
        index = attention.output.index
        output[:, index] = _turned("ohd,hde->ohe", output[:, index], turn.mT)
        query, key = query_key_turns(*statistics.query_key(attention))
        _turn_rows(tensors, attention.query, query)
        _turn_rows(tensors, attention.key, key)
    return attentions


def value_turn(output: Tensor, columns: Tensor, covariance: Tensor, gradients: Tensor) -> Tensor:
    """Orthogonal matrices (heads, new, old) that put the best directions of v first."""
    root, inverse = roots(covariance, RIDGE)
    columns = columns.to(output.device)
    weights = output.detach().double()[:, columns].permute(1, 0, 2)  # (heads, out, head_dim)
    weighted = roots(gradients)[0] @ weights @ root
    right = torch.linalg.svd(weighted, full_matrices=True).Vh  # (heads, new, head_dim)
    return torch.linalg.qr(inverse @ right.mT).Q.mT


def query_key_turns(query: Tensor, key: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices (heads, new, old) for q and k; one is the transposed inverse of the other."""
    (query_root, _), (key_root, key_inverse) = (roots(c, RIDGE) for c in (query, key))
    spread, right = torch.linalg.svd(query_root @ key_root)[1:]
    spread = spread.sqrt()[..., None]
    turn_query = right @ key_root / spread
    turn_key = right @ key_inverse * spread
    # Falling order of what each direction does to the loss, not to the products alone.
    moved = turn_key @ gradients @ turn_key.mT
    importance = (moved.diagonal(dim1=-2, dim2=-1)) * spread[..., 0] ** 2
    order = importance.argsort(dim=-1, descending=True)[..., None].expand_as(turn_query)
    return turn_query.gather(1, order), turn_key.gather(1, order)


def _turn_rows(tensors: dict[str, Tensor], part: Part, turn: Tensor) -> None:
    weight = tensors[part.weight]
    weight[part.index] = _turned("hdi,hed->hei", weight[part.index], turn)
    if not part.bias:
        return
    sizes = [len(tensors[name]) for name in part.bias]
    whole = torch.cat([tensors[name] for name in part.bias])
    whole[part.index] = _turned("hd,hed->he", whole[part.index], turn)
    for name, piece in zip(part.bias, whole.split(sizes), strict=True):
        tensors[name].copy_(piece)


def _turned(equation: str, weight: Tensor, turn: Tensor) -> Tensor:
    return torch.einsum(equation, weight.double(), turn.double()).to(weight.dtype)


class _Statistics:
    """Second moments of q, k and what the heads give, and of the gradients, by attention."""

    def __init__(self, model: nn.Module, attentions: Sequence[Attention]) -> None:
        self.attentions = attentions
        self.weights = {
            part.weight for a in attentions for part in (a.query, a.key, a.value, a.output)
        }
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.count = 0

    def tap(self, call: Call, output: Tensor, gradient: Tensor) -> None:
        for attention in self.attentions:
            if call.weight == attention.query.weight:
                self._query(attention, output, gradient)
            if call.weight == attention.key.weight:
                self._key(attention, output)
            if call.weight == attention.output.weight:
                self._output(attention, call.rows, gradient)

    def saw(self, attention: Attention) -> bool:
        """Whether all layers of an attention were seen."""
        whats = ("query", "key", "output")
        return all((attention.output.weight, what) in self.sums for what in whats)

    def _add(self, attention: Attention, what: str, value: Tensor) -> None:
        key = (attention.output.weight, what)
        self.sums[key] = self.sums[key] + value if key in self.sums else value

    def _query(self, attention: Attention, output: Tensor, gradient: Tensor) -> None:
        q, g = output[..., attention.query.index], gradient[..., attention.query.index]
        weights = place_weights(g.transpose(-3, -2)).transpose(-2, -1)  # (..., places, heads)
        self._add(attention, "query", _moments(q, q * weights[..., None]))
        self._add(attention, "query_gradients", _moments(g, g))

    def _key(self, attention: Attention, output: Tensor) -> None:
        k = output[..., attention.key.index]
        k = k - k.mean(dim=-3, keepdim=True)
        self._add(attention, "key", _moments(k, k))

    def _output(self, attention: Attention, rows: Tensor, gradient: Tensor) -> None:
        z = rows[..., attention.output.index]
        weights = place_weights(gradient).reshape(*z.shape[:-2], 1, 1)
        self._add(attention, "output", _moments(z, z * weights))
        self._add(attention, "output_sum", (z * weights).double().sum((0, 1)))
        self._add(attention, "output_weight", weights.double().sum())
        flat = gradient.flatten(0, -2).float()
        self._add(attention, "gradients", (flat.T @ flat).double())

    def value(self, attention: Attention) -> tuple[Tensor, Tensor]:
        """Weighted covariance of what each head gives; second moment of the output's gradient."""
        total, moment, mean, gradients = (
            self.sums[attention.output.weight, what]
            for what in ("output_weight", "output", "output_sum", "gradients")
        )
        mean = mean / total
        return moment / total - mean[:, :, None] * mean[:, None, :], gradients

    def query_key(self, attention: Attention) -> tuple[Tensor, Tensor, Tensor]:
        """Moments of q and of k, each with trace 1, and of the gradient of q, of each head.

        Were their traces unlike, the turned q would be that much larger than the turned k.
        """
        whats = ("query", "key", "query_gradients")
        query, key, gradients = (self.sums[attention.output.weight, what] for what in whats)
        return _of_trace_one(query), _of_trace_one(key), gradients


def _of_trace_one(moments: Tensor) -> Tensor:
    trace = moments.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    even = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    return torch.where(trace > TINY, moments / trace.clamp_min(TINY), even / len(even))


def _moments(left: Tensor, right: Tensor) -> Tensor:
    """(..., heads, d) twice -> (heads, d, d), in float64."""
    left, right = (x.flatten(0, -3).transpose(0, 1).float() for x in (left, right))
    return (left.mT @ right).double()
