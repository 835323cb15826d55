"""Small timm transformers for the digits, and how to train them from nothing in a minute or two."""

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from domains.data.folders import check_name
from domains.recipe import FinetuneSettings
from domains.running.random import seeded


@dataclass(frozen=True)
class DemoModel:
    """Name and arguments for `timm.create_model`."""

    name: str
    kwargs: dict[str, Any]


_SHAPE: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
}

DIGITS_MODELS: dict[str, DemoModel] = {
    "vit": DemoModel("vit_tiny_patch16_224", _SHAPE),
    "deit": DemoModel("deit_tiny_distilled_patch16_224", _SHAPE),
    # Layer scales from 0.1 and relative positions alone learn too slowly for so short a training.
    "beit": DemoModel(
        "beit_base_patch16_224", {**_SHAPE, "init_values": 1.0, "use_abs_pos_emb": True}
    ),
}

_COMMON: dict[str, Any] = {
    "batch_size": 32,
    "smoothing": 0.05,
    # No flips (2 and 5 would be lost), crops that keep the whole stroke, colours at will.
    "hflip": 0.0,
    "crop_scale": (0.7, 1.0),
    "crop_ratio": (0.85, 1 / 0.85),
    "color_jitter": 0.4,
    "grayscale": 0.0,
}

DIGITS_RECIPE = FinetuneSettings(epochs=7, lr=1e-3, warmup_epochs=1, **_COMMON)
"""Training of a `digits_model` from nothing, on all digits."""

DIGITS_RECOVERY = FinetuneSettings(epochs=3, lr=5e-4, warmup_epochs=0.2, **_COMMON)
"""Training of the same model after pruning."""


def digits_model(family: str = "vit", *, seed: int = 0) -> nn.Module:
    """Return a new small model for the digits, weights drawn so that it learns in few epochs.

    Parameters
    ----------
    family : str
        One of `DIGITS_MODELS`.
    seed : int
        Decides the weights; the state of the process does not.

    Notes
    -----
    timm draws all weights with a deviation of 0.02, which suits wide models and long schedules: at
    this width the first epochs go by without learning. Xavier's uniform weights, and positions as
    large as the patches, learn from the first epoch on.

    References
    ----------
    Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks",
    AISTATS 2010.
    """
    check_name(family, DIGITS_MODELS, "digits model", "domains.DIGITS_MODELS")
    demo = DIGITS_MODELS[family]
    with seeded(seed):
        model = timm.create_model(demo.name, **demo.kwargs)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        for name, parameter in model.named_parameters():
            if name.endswith(("pos_embed", "relative_position_bias_table")):
                torch.nn.init.normal_(parameter, std=0.3)
    return model
