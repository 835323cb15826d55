"""Dependency graphs of torch models: which parameter dimensions must shrink together."""

from depgraph.coupling.groups import Group, Member
from depgraph.coupling.propagate import rule
from depgraph.errors import DepgraphError
from depgraph.front import count_macs, trace
from depgraph.graph import DependencyGraph
from depgraph.plan import Plan
from depgraph.storing.find import set_source, source_of
from depgraph.storing.store import load, load_structure, plans_of, save

__all__ = [
    "DependencyGraph",
    "DepgraphError",
    "Group",
    "Member",
    "Plan",
    "count_macs",
    "load",
    "load_structure",
    "plans_of",
    "rule",
    "save",
    "set_source",
    "source_of",
    "trace",
]
