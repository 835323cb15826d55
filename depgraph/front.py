"""The front door: from a model and example inputs to its dependency graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depgraph.coupling.alongside import other_branches, other_modes
from depgraph.coupling.other_calls import other_calls, other_sizes
from depgraph.errors import DepgraphError
from depgraph.graph import DependencyGraph
from depgraph.tracing.collection import collection_paused
from depgraph.tracing.deciding import decisions_noted
from depgraph.tracing.meta import results_kept
from depgraph.tracing.placing import without_data
from depgraph.tracing.trace import Trace, trace_forward
from depgraph.tracing.watch import ready_to_watch


@collection_paused()
@ready_to_watch()
@results_kept()
def trace(model: nn.Module, example_inputs: Any) -> DependencyGraph:
    """Find which parameter dimensions of a model must shrink together.

    Parameters
    ----------
    model : nn.Module
        On any device, ``meta`` included, in eval or train mode; it is not changed and no weight
        is read.
    example_inputs : Tensor, tuple of Tensors, or mapping of str to Tensor
        What the model is called with; a mapping holds keyword arguments. Shapes and dtypes matter,
        and the values of masks and integers that the model looks at (``graph.traced.reads``). A
        leading dimension of 1 is traced as 2 where the model allows it, so that the batch can be
        told from other dimensions.

    Returns
    -------
    DependencyGraph

    Raises
    ------
    DepgraphError
        When the forward cannot be traced.

    Notes
    -----
    Forward hooks that give something back, or write to a module or a tensor, are part of what is
    traced; those that only look on (that record, count or print) do not run. Where training runs
    other modules than evaluation does, that mode is traced too, and what it couples holds. So are
    a batch of one, a larger size and those that it compares with where code decides by sizes and
    runs other ops there, and any other call, with gradients or in another type, that reads
    parameters which no other reads.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    >>> [(group.name, group.size, group.frozen) for group in trace(model, torch.randn(1, 4)).groups]
    ... # doctest: +NORMALIZE_WHITESPACE
    [('hidden', 6, None), ('0.fixed', 4, "dimension 1 of the model's input"),
     ('2.fixed', 2, "dimension of the model's outputs")]
    """
    with decisions_noted() as decides:
        traced = _traced(model, example_inputs)
        modes = other_modes(model, traced)
    branches = other_branches(model, traced)
    others = (*modes, *(other_sizes(model, traced, decides) if decides.made else ()))
    calls = other_calls(model, traced, (*others, *branches))
    graph = DependencyGraph(traced, (*others, *calls), branches)
    graph.origin = without_data(model)
    return graph


def _traced(model: nn.Module, example_inputs: Any) -> Trace:
    """The call of the example alone."""
    if not isinstance(model, nn.Module):
        raise DepgraphError(f"the model must be an nn.Module, not {type(model).__name__}")
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    else:
        args = (example_inputs,)
    _check(model, args, kwargs)
    return trace_with_visible_batch(model, args, kwargs)


def _check(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what has no trace, before any forward."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors:
        raise DepgraphError("the example inputs hold no Tensor; pass what the model is called with")
    if all(tensor.dim() and not len(tensor) for tensor in tensors):
        raise DepgraphError("the example inputs hold no sample; pass a batch of at least one")
    for name, module in model.named_modules():
        where = f"module '{name}' ({type(module).__name__})" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise DepgraphError(f"{where} is TorchScript; pass the nn.Module that it was made from")
        if isinstance(module, nn.DataParallel):
            raise DepgraphError(f"{where} spreads batches over devices; pass the module in it")
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise DepgraphError(
                f"{where} is compiled; pass the module as it was, and compile what comes back"
            )
        if any(
            map(nn.parameter.is_lazy, (*module._parameters.values(), *module._buffers.values()))
        ):
            raise DepgraphError(f"{where} has no shapes yet; call the model once before")


def trace_with_visible_batch(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Trace:
    """Trace at batch 2 where the inputs have batch 1 and the model takes more."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if all(tensor.dim() > 0 and tensor.shape[0] == 1 for tensor in tensors):
        doubled = pytree.tree_map(_twice, (args, kwargs))
        try:
            return trace_forward(model, *doubled)
        except DepgraphError:
            pass  # a model for batch 1 only: its own trace below tells what is wrong, if anything
    return trace_forward(model, args, kwargs)


def _twice(value: Any) -> Any:
    return value.expand(2, *value.shape[1:]) if isinstance(value, Tensor) else value


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of a model for batch 1: linear, matmul, convolution and attention.

    Parameters
    ----------
    model : nn.Module
    example_inputs : Tensor, tuple of Tensors, or mapping of str to Tensor

    Returns
    -------
    int

    Raises
    ------
    DepgraphError
        When the forward cannot be traced.
    """
    return DependencyGraph(_traced(model, example_inputs)).macs
