"""One rule per family of ops; importing this package registers them all."""

from depgraph.coupling.rules import (
    contract,
    convolve,
    create,
    norm,
    pointwise,
    reduce,
    reshape,
    select,
    spatial,
)

__all__ = [
    "contract",
    "convolve",
    "create",
    "norm",
    "pointwise",
    "reduce",
    "reshape",
    "select",
    "spatial",
]
