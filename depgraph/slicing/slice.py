"""Cuts a plan out of a model: new tensors, new attributes, and generated forwards where needed.

Everything is prepared on a structural copy and proven there by `verify`; the caller's model changes
only afterwards, and only when asked to.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from depgraph.errors import DepgraphError
from depgraph.front import trace
from depgraph.graph import DependencyGraph
from depgraph.plan import Plan
from depgraph.slicing.edits import Edits
from depgraph.slicing.slicer import Slicer
from depgraph.slicing.verify import Mismatch, verify
from depgraph.storing.guard import guard
from depgraph.tracing.collection import collection_paused
from depgraph.tracing.inputs import example_from_spec
from depgraph.tracing.meta import results_kept
from depgraph.tracing.trace import named_tensors, shape, structural_copy
from depgraph.tracing.watch import ready_to_watch


@collection_paused()
@ready_to_watch()
@results_kept()
@torch.inference_mode(False)  # what is made here is to be trained
@torch.no_grad()
def apply_plan(plan: Plan, model: nn.Module, inplace: bool = False) -> nn.Module:
    """See `depgraph.Plan.apply`."""
    graph = _graph_for(plan, model)
    slicer = Slicer(graph, plan, model)
    edits = Edits(caches=graph.traced.caches)
    edits.tensors = slicer.new_tensors(share=inplace)
    edits.removed = slicer.removed()
    slicer.add_attributes(edits)
    slicer.add_classes(edits)
    small = structural_copy(model)
    edits.apply(small)
    while (mismatch := _mismatch(slicer, small)) or slicer.unfit(edits, small):
        slicer.repair(mismatch, edits, small)
        edits.apply_structure(small)
    slicer.rescale(edits)
    if inplace:
        edits.apply(model)
        small = model
    guard(small)
    _remember(dataclasses.replace(plan, factors=slicer.rescalings.factors), small)
    return small


def _remember(plan: Plan, small: nn.Module) -> None:
    """Keep the plan with the model, without its graph, for `depgraph.save`."""
    earlier = vars(small).get("depgraph_plans", [])
    vars(small)["depgraph_plans"] = [*earlier, dataclasses.replace(plan, _graph=None)]


def _mismatch(slicer: Slicer, small: nn.Module) -> Mismatch | None:
    """What the verifying trace finds wrong; None when all agrees."""
    try:
        verify(slicer.graph, small, slicer.kept, slicer.rescalings.numbers)
    except Mismatch as mismatch:
        return mismatch
    return None


def _graph_for(plan: Plan, model: nn.Module) -> DependencyGraph:
    """The graph the plan was made from, or that of the model traced again; both must fit."""
    tensors, parameters = named_tensors(model)
    graph = plan._graph
    if graph is None:
        graph = trace(model, example_from_spec(plan.inputs))
    for name in [*(n for n in graph.traced.tensors if n in graph.traced.parameters), *parameters]:
        node, tensor = graph.traced.tensors.get(name), tensors.get(name)
        expected = None if node is None else shape(node)
        found = None if tensor is None else tuple(tensor.shape)
        if expected != found:
            raise DepgraphError(
                f"the plan is for another model: parameter '{name}' has shape {found}, the plan "
                f"expects {expected}; make a plan from depgraph.trace of this model"
            )
    graph.check_plan(plan)
    return graph
