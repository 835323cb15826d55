"""Dependency graphs of torch models: which parameter dimensions must shrink together."""

from depgraph.errors import DepgraphError

__all__ = ["DepgraphError"]
