"""Small models for the engine's tests: real timm classes at toy sizes, and modules with a quirk."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

TINY = {
    "vit_base_patch16_224": {"img_size": 32, "patch_size": 8},
    "deit_base_distilled_patch16_224": {"img_size": 32, "patch_size": 8},
    "beit_base_patch16_224": {"img_size": 32, "patch_size": 8},
    "beitv2_base_patch16_224": {"img_size": 32, "patch_size": 8},
}


def tiny(name: str = "vit_base_patch16_224", **kwargs: object) -> nn.Module:
    """A timm model of two blocks, width 48, 4 heads, 10 classes, with no parameter at zero."""
    settings = {"depth": 2, "embed_dim": 48, "num_heads": 4, "num_classes": 10, **TINY[name]}
    model = timm.create_model(name, **{**settings, **kwargs}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def images(batch: int = 2) -> Tensor:
    """Inputs for `tiny`."""
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class WrittenOut(nn.Module):
    """An attention with every size written into its forward, dropout and a scale by width."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, 72)
        self.drop = nn.Dropout(0.5)
        self.proj = nn.Linear(24, 24)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 4, 6).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5).softmax(-1)
        out = self.drop(attention) @ v
        return x + self.proj(out.transpose(1, 2).reshape(x.shape[0], -1, 24))


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(tokens)).relu())
