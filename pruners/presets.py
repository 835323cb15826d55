"""Methods of others as arguments of `prune`, to hold one's own against.

``prune(model, x, **PRESETS["vbp"], ratio=0.5, batches=batches)``; each is the idea of its paper on
this project's groups, costs and slicing, not its authors' code.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "vbp": {
        "metric": "variance",
        "kinds": ("hidden",),
        "scope": "global",
        "normalise": "none",
        "per": "unit",
        "compensate": "means",
    },
    "corp": {
        "metric": "flap",
        "kinds": ("hidden", "head_dim"),
        "scope": "uniform",
        "compensate": "readers",
    },
    "label_free": {"metric": "obs_features", "kinds": "auto", "compensate": True},
    "isomorphic": {"metric": "taylor", "scope": "isomorphic", "compensate": False},
}
"""By name.

``"vbp"``: hidden units whose activation varies least, their means moved to the biases. Berisha,
Mehnert, Condurache: "Variance-Based Pruning for Accelerating and Compressing Trained Networks",
ICCV 2025. ``"corp"``: the same share of every layer's hidden units and head dims, what is left
fitted to the whole in closed form, without labels. Zhang and Yang: "CORP: Closed-Form One-shot
Representation-Preserving Structured Pruning", arXiv 2602.05243, 2026; units are chosen by variance
times squared norm here, and the fit is of outputs, the logits of attention being left to principal
directions. ``"label_free"``: what changes the features least, as SnapViT (arXiv 2510.17700, 2025)
asks for. ``"isomorphic"``: layers of one shape ranked apart from those of another, no refit. Fang,
Ma, Bi Mi, Wang: "Isomorphic Pruning for Vision Models", ECCV 2024.
"""
