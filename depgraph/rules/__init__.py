"""One rule per family of ops; importing this package registers them all."""

from depgraph.rules import contract, create, norm, pointwise, reduce, reshape, select

__all__ = ["contract", "create", "norm", "pointwise", "reduce", "reshape", "select"]
