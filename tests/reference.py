"""The judge of exactness: the original model with the removed units switched off, not sliced.

It shares nothing with the slicer. It sets to zero whatever `plan.kept` does not keep, and lets each
norm over a pruned dim take its statistics over the kept channels; the model keeps its full shape.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from depgraph import DependencyGraph, Plan
from depgraph.coupling.axes import Atom, Axis, axis_size, kept_indices
from depgraph.coupling.propagate import op_name


class KeptNorm(nn.Module):
    """A LayerNorm or RMSNorm of its input's kept channels; the others are zero.

    Parameters
    ----------
    norm : nn.Module
        Has `weight`, perhaps `bias`, over the last dim, and `normalized_shape`.
    kept : LongTensor
        Channels kept of the last dim.
    """

    norm: Any
    kept: Tensor

    def __init__(self, norm: nn.Module, kept: Tensor) -> None:
        super().__init__()
        self.norm = copy.deepcopy(norm)
        self.register_buffer("kept", kept, persistent=False)
        for name, parameter in norm.named_parameters():
            setattr(self.norm, name, nn.Parameter(parameter.detach()[kept]))
        self.norm.normalized_shape = (len(kept),)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of `x`."""
        return torch.zeros_like(x).index_copy(-1, self.kept, self.norm(x[..., self.kept]))


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """Copy a model and switch off in the copy what a plan removes.

    Parameters
    ----------
    model : nn.Module
        Stays as it is.
    plan : Plan
        Only its `kept` and `kept_buffers` are read.

    Returns
    -------
    nn.Module
        Of the original's shapes. Its output is what the sliced model must give.
    """
    model = switched_off(model, plan)
    for name, module in list(model.named_modules()):
        channels = plan.kept.get(f"{name}.weight", {}).get(0)
        if channels is not None and hasattr(module, "normalized_shape"):
            model.set_submodule(name, KeptNorm(module, channels))
    return model


def switched_off(model: nn.Module, plan: Plan) -> nn.Module:
    """Copy a model and set to zero in the copy what a plan removes; norms stay as they are."""
    model = copy.deepcopy(model)
    for tensors, kept in (
        (dict(model.named_parameters()), plan.kept),
        (dict(model.named_buffers()), plan.kept_buffers),
    ):
        for name, dims in kept.items():
            for dim, indices in dims.items():
                _zero_all_but(tensors[name], dim, indices)
    return model


@torch.no_grad()
def masked_output(model: nn.Module, graph: DependencyGraph, plan: Plan, inputs: Tensor) -> Tensor:
    """Run the original with the removed units off, any kind of norm over what is kept.

    Parameters
    ----------
    model : nn.Module
        Stays as it is.
    graph : DependencyGraph
        Of the model; says which channels a norm without parameters of its own sees.
    plan : Plan
    inputs : Tensor

    Returns
    -------
    Tensor
    """
    off = switched_off(model, plan)
    with KeptStatistics(graph, plan, off):
        output: Tensor = off(inputs)
    return output


class KeptStatistics(TorchFunctionMode):
    """Norms, means and variances inside run over kept channels; norms give zero elsewhere.

    Calls are matched with the ops of the trace by their order, so a run at another size or in
    another mode must take the same of these as the trace. Norms of the model whose weights the
    trace does not read give what nothing returns: they run as they are.
    """

    def __init__(self, graph: DependencyGraph, plan: Plan, model: nn.Module) -> None:
        super().__init__()
        kept = graph.kept_atoms(plan)
        read = {name for name, node in graph.traced.tensors.items() if node.users}
        named = dict(model.named_parameters(remove_duplicate=False))
        self._unread = {id(weight) for weight in named.values()}
        self._unread -= {id(weight) for name, weight in named.items() if name in read}
        self._calls: Iterator[tuple[str, list[_Kept]]] = (
            (
                op_name(node).removeprefix("aten."),
                [_where_cut(axis, kept) for axis in graph.propagation.axes(node.args[0])],
            )
            for node in graph.traced.nodes
            if node.op == "call_function" and op_name(node).removeprefix("aten.") in _OVER_KEPT
        )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "_weight_norm":  # a weight that is switched off has no direction
            return func(*args, **(kwargs or {})).nan_to_num()
        if name in _QUOTIENTS and all(isinstance(x, Tensor) for x in args):
            above, below = args  # nor has what the forward itself divides by its length
            below = below.masked_fill((above.detach() == 0) & (below.detach() == 0), 1)
            return func(above, below, **(kwargs or {}))
        if name not in _OVER_KEPT or any(
            isinstance(weight, Tensor) and id(weight) in self._unread
            for weight in (*args, *(kwargs or {}).values())
        ):
            return func(*args, **(kwargs or {}))
        traced, kept = next(self._calls, ("nothing more", []))
        if traced != name:
            raise CannotJudgeError(f"the run takes {name} where the trace has {traced}")
        return _OVER_KEPT[name](func, kept, *args, **(kwargs or {}))


_QUOTIENTS = {"div", "true_divide"}


class CannotJudgeError(Exception):
    """What a run of the original must give is not known."""


_Kept = tuple[int, Tensor] | None
"""Size in the trace and indices kept; None where all are, at whatever size."""


def _where_cut(axis: Axis, kept: Mapping[Atom, Tensor]) -> _Kept:
    indices = kept_indices(axis, dict(kept))
    return None if len(indices) == axis_size(axis) else (axis_size(axis), indices)


def _at(size: int, kept: _Kept) -> Tensor:
    """The indices kept of a dimension of that size."""
    if kept is None:
        return torch.arange(size)
    if kept[0] != size:
        raise CannotJudgeError(f"{size} indices where the trace has {kept[0]}")
    return kept[1]


def _layer_norm(
    func: Any, kept_dims: list[_Kept], x: Tensor, normalized: Any, *affine: Any, **options: Any
) -> Tensor:
    first = x.ndim - len(normalized)
    if tuple(x.shape[first:]) != tuple(normalized):
        raise CannotJudgeError("the original takes no such size")
    kept = [torch.arange(size) for size in x.shape[:first]]
    kept += map(_at, x.shape[first:], kept_dims[first:])
    names = ("weight", "bias") if func.__name__ == "layer_norm" else ("weight",)
    options = {**dict(zip(names, affine, strict=False)), **options}
    for key in names:
        if options.get(key) is not None:
            options[key] = options[key][torch.meshgrid(*kept[first:], indexing="ij")]
    places = torch.meshgrid(*kept, indexing="ij")
    small = x[places]
    return torch.zeros_like(x).index_put(places, func(small, small.shape[first:], **options))


def _group_norm(
    func: Any,
    kept: list[_Kept],
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    out = torch.zeros_like(x)
    for channels in torch.arange(x.shape[1]).chunk(groups):
        left = _at(x.shape[1], kept[1])
        own = left[torch.isin(left, channels)]
        if len(own):
            affine = (None if tensor is None else tensor[own] for tensor in (weight, bias))
            out[:, own] = func(x[:, own], 1, *affine, eps)
    return out


def _statistic(func: Any, kept: list[_Kept], x: Tensor, dim: Any = None, **options: Any) -> Tensor:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    for reduced in dims:
        if kept[reduced] is not None:
            x = x.index_select(reduced, _at(x.shape[reduced], kept[reduced]))
    result: Tensor = func(x, list(dims), **options)
    return result


_OVER_KEPT: dict[str, Callable[..., Tensor]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "group_norm": _group_norm,
    "mean": _statistic,
    "var": _statistic,
    "std": _statistic,
}


@torch.no_grad()
def _zero_all_but(tensor: Tensor, dim: int, kept: Tensor) -> None:
    gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
    gone[kept] = False
    tensor.index_fill_(dim, gone.nonzero().flatten().to(tensor.device), 0)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every float parameter and buffer random values that carry a signal of order one.

    Fresh models start with zeros (biases, tables, tokens, layer scales) or ones (norms), where a
    wrong index would go unnoticed.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith("var"):
            values = 0.5 + noise.square()
        elif name.endswith("weight") and tensor.ndim > 1:
            values = noise * tensor[0].numel() ** -0.5
        elif name.endswith("weight"):
            values = 1 + 0.3 * noise
        else:
            values = 0.5 * noise
        tensor.copy_(values)
    return model


def random_units(
    graph: DependencyGraph, seed: int, ratio: float | None = None
) -> dict[str, list[int]]:
    """Choose random kept units for each prunable group, another number in each.

    Parameters
    ----------
    graph : DependencyGraph
    seed : int
    ratio : float, optional
        Share removed, give or take half of what stays; None: any number from one unit to all.

    Returns
    -------
    dict of str to list of int
        For `graph.plan`; each group keeps at least one unit.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in graph.groups:
        if group.frozen:
            continue
        if ratio is None:
            number = int(torch.randint(1, group.size + 1, (), generator=generator))
        else:
            spread = 0.5 + float(torch.rand((), generator=generator))
            number = min(group.size, max(1, round(group.size * (1 - ratio) * spread)))
        units = torch.randperm(group.size, generator=generator)[:number]
        kept[group.name] = units.sort().values.tolist()
    return kept


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """Return max |got - expected| / max |expected|; 0 where both are zero all over."""
    difference = (got - expected).abs().max()
    return (difference / expected.abs().max()).item() if difference != 0 else 0.0


def measured_params(model: nn.Module) -> int:
    """Return the number of parameters, a tied one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def measured_macs(model: nn.Module, inputs: Tensor) -> int:
    """Count by torch's own counter, in a real run on the first image, attention written out."""
    model = copy.deepcopy(model).requires_grad_(False)  # the counter stumbles over their views
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs[:1])
    return counter.get_total_flops() // 2


def state(model: nn.Module) -> Mapping[str, Tensor]:
    """Return a copy of all parameters and buffers, to see whether a model was touched."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors}
