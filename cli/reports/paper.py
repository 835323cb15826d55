"""What the paper reports for its own runs: cited, to stand beside ours, and never mixed into them.

References
----------
Riaz and Smeaton, grouped structural global pruning of vision transformers, 2025: PACS, half of the
units removed by the Hessian metric; change of the accuracy in points, and speed-up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Cited:
    """Accuracy against the dense model, in points, and times faster."""

    points: float
    speedup: float


SOURCE = "Riaz and Smeaton 2025"
PACS = frozenset({"art_painting", "cartoon", "photo", "sketch"})
"""The domains of PACS, by which its results are known."""

_HALF_BY_HESSIAN = {
    "vit": Cited(-2.94, 2.5),
    "beit": Cited(-1.42, 1.81),
    "deit": Cited(-1.72, 2.15),
}


def cited(domains: frozenset[str], model: str, metric: str, ratio: float | None) -> Cited | None:
    """The paper's figures for a result of ours; None where it has none.

    Examples
    --------
    >>> cited(PACS, "deit_base_patch16_224", "hessian", 0.5).points
    -1.72
    >>> cited(PACS, "deit_tiny_patch16_224", "hessian", 0.5) is None
    True
    """
    family = re.match(r"(vit|beit|deit)[-_]?b(ase)?(?![a-z])", model.lower())
    if family is None or domains != PACS or metric != "hessian" or ratio != 0.5:
        return None
    return _HALF_BY_HESSIAN[family[1]]
