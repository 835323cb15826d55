"""Ops on the positions of images and sequences: their extents stay whole, channels pass through."""

from __future__ import annotations

from torch import fx

from depgraph.coupling.propagate import Axes, Propagation, arguments, op_name, rule
from depgraph.tracing.trace import shape

_POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
_RESIZES = ("nearest", "nearest-exact", "linear", "bilinear", "bicubic", "trilinear")


@rule(
    *(f"aten.{pool}{rank}d" for pool in _POOLS for rank in (1, 2, 3)),
    *(f"aten.max_pool{rank}d_with_indices" for rank in (2, 3)),
    *(f"aten.upsample_{kind}{rank}d" for kind in _RESIZES for rank in (1, 2, 3)),
    *(f"aten._upsample_{kind}2d_aa" for kind in ("bilinear", "bicubic")),
    *(f"aten._upsample_nearest_exact{rank}d" for rank in (1, 2, 3)),
    *(f"aten.{kind}_pad{rank}d" for kind in ("reflection", "replication") for rank in (1, 2, 3)),
)
def resampled(p: Propagation, node: fx.Node) -> Axes | list[Axes]:
    """Each channel for itself, over positions that give way to new ones."""
    rank = int(op_name(node).removesuffix("_aa").removesuffix("_with_indices")[-2])
    x = node.all_input_nodes[0]
    lead = len(shape(x)) - rank
    p.freeze(x, f"{p.label(node)} resamples it", range(lead, lead + rank))
    values = node.meta["val"]
    several = isinstance(values, (tuple, list))
    sizes = [int(size) for size in (values[0] if several else values).shape[lead:]]
    spatial = [p.algebra.new(size, f"positions made by {p.label(node)}") for size in sizes]
    axes = [*p.axes(x)[:lead], *spatial]
    return [axes] * len(values) if several else axes


@rule("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d")
def sampled(p: Propagation, node: fx.Node) -> Axes:
    """Each channel for itself, at the places of a grid: ``(b, c, ...)`` at ``(b, places, 2)``."""
    x, grid = node.all_input_nodes
    rank = len(shape(x))
    p.freeze(x, f"{p.label(node)} resamples it", range(2, rank))
    p.freeze(grid, f"{p.label(node)} takes coordinates from it", [rank - 1])
    p.join(node, (x, 0), (grid, 0))
    return [*p.axes(x)[:2], *p.axes(grid)[1:-1]]


@rule("aten.pad", "aten.constant_pad_nd")
def pad(p: Propagation, node: fx.Node) -> Axes:
    """Positions added at the ends of dimensions; channels may be padded, and pruned besides."""
    a = arguments(node)
    x = a["self"]
    axes = p.axes(x)
    mode = a.get("mode", "constant")
    for i in range(0, len(a["pad"]), 2):
        before, after = a["pad"][i : i + 2]
        dim = len(axes) - 1 - i // 2
        if before < 0 or after < 0 or (mode != "constant" and (before or after)):
            p.freeze(x, f"{p.label(node)} cuts or mirrors it", [dim])
            axes[dim] = p.algebra.new(shape(node)[dim], f"padded by {p.label(node)}")
        elif before or after:
            reason = f"padding by {p.label(node)}"
            parts = [p.algebra.new(n, reason) for n in (before, after)]
            sized = [parts[0]] * (before > 0) + [axes[dim]] + [parts[1]] * (after > 0)
            axes[dim] = p.algebra.concat(sized, reason)
    return axes


@rule("aten.im2col")
def unfold(p: Propagation, node: fx.Node) -> Axes:
    """Patches as columns: ``channels x kernel`` by place."""
    x = node.all_input_nodes[0]
    lead = len(shape(x)) - 3
    p.freeze(x, f"{p.label(node)} cuts patches out of it", [lead + 1, lead + 2])
    axes = p.axes(x)
    kernel = p.algebra.new(shape(node)[lead] // shape(x)[lead], "place within a patch")
    return [*axes[:lead], (*axes[lead], *kernel), p.algebra.new(shape(node)[-1], "patches")]


@rule("aten.col2im")
def fold(p: Propagation, node: fx.Node) -> Axes:
    """Columns of ``channels x kernel`` laid back to places, where they overlap they add up."""
    x = node.all_input_nodes[0]
    lead = len(shape(x)) - 2
    p.freeze(x, f"{p.label(node)} lays patches out along it", [lead + 1])
    axes = p.axes(x)
    channels = shape(node)[lead]
    sizes = [channels, shape(x)[lead] // channels]
    outer, kernel = p.algebra.regroup([axes[lead]], sizes, p.label(node))
    p.algebra.freeze(kernel, "place within a patch")
    return [*axes[:lead], outer, *_positions(p, node)]


@rule("aten.unfold")
def windows(p: Propagation, node: fx.Node) -> Axes:
    """Windows along one dimension, their extent as a new last one."""
    a = arguments(node)
    x = a["self"]
    dim = a["dimension"] % len(shape(x))
    p.freeze(x, f"{p.label(node)} slides over it", [dim])
    axes = p.axes(x)
    axes[dim] = p.algebra.new(shape(node)[dim], f"windows of {p.label(node)}")
    return [*axes, p.algebra.new(a["size"], f"extent of windows of {p.label(node)}")]


@rule("aten.pixel_shuffle", "aten.pixel_unshuffle")
def pixel_shuffle(p: Propagation, node: fx.Node) -> Axes:
    """``channels x factor^2`` along dimension -3 becomes positions, or the reverse."""
    x = node.all_input_nodes[0]
    lead = len(shape(x)) - 3
    p.freeze(x, f"{p.label(node)} moves it", [lead + 1, lead + 2])
    axes = p.axes(x)
    before, after = shape(x)[lead], shape(node)[lead]
    reason = f"place within a pixel of {p.label(node)}"
    spatial = [
        p.algebra.new(size, f"positions made by {p.label(node)}") for size in shape(node)[-2:]
    ]
    if after >= before:
        return [*axes[:lead], (*axes[lead], *p.algebra.new(after // before, reason)), *spatial]
    channels, place = p.algebra.regroup([axes[lead]], [after, before // after], p.label(node))
    p.algebra.freeze(place, reason)
    return [*axes[:lead], channels, *spatial]


def _positions(p: Propagation, node: fx.Node) -> Axes:
    reason = f"positions made by {p.label(node)}"
    return [p.algebra.new(size, reason) for size in shape(node)[-2:]]
