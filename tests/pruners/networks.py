"""Small networks with what metrics stumble over: batch norm, depthwise layers, tied weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import depgraph
from tests.depgraph.models import images, tiny


class Tied(nn.Module):
    """Tokens to classes, the classifier being the embedding, over the mean of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head((x + self.hidden(x).relu()).mean(1))


class Twice(nn.Module):
    """One layer applied twice, by a functional call, and a factor for each unit."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            hidden = nn.functional.linear(x, self.up.weight, self.up.bias)
            x = x + self.down(hidden.relu() * self.scale)
        return self.head(x)


def convolutions() -> nn.Module:
    """Batch norm, a depthwise and a strided convolution; statistics away from zero and one."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3, stride=2), nn.GELU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(6, 4)),
    )
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return net


def network(name: str) -> tuple[nn.Module, Tensor]:
    """One of the networks, in evaluation mode, and twelve samples for it; four classes or more."""
    torch.manual_seed(0)
    if name == "tied":
        return Tied().eval(), torch.randint(11, (12, 5))
    if name == "twice":
        return Twice().eval(), torch.randn(12, 6)
    if name == "convolutions":
        return convolutions().eval(), torch.randn(12, 3, 9, 9)
    return tiny(name), images(12)


NETWORKS = ("tied", "twice", "convolutions", "vit_base_patch16_224", "beit_base_patch16_224")


def batches(inputs: Tensor, size: int = 4, classes: int = 4) -> list[tuple[Tensor, Tensor]]:
    """All samples in batches, with labels in turn."""
    labels = torch.arange(len(inputs)) % classes
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def gated(model: nn.Module, group: depgraph.Group, gate: Tensor) -> dict[str, Tensor]:
    """All parameters, those of each unit of a group multiplied by its gate."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for member in group.members:
        weight = weights[member.parameter]
        factor = torch.ones(weight.shape[member.dim], dtype=gate.dtype)
        factor = factor.index_put(
            (member.positions.flatten(),), gate.repeat_interleave(member.positions.shape[1])
        )
        shape = [-1 if dim == member.dim else 1 for dim in range(weight.dim())]
        weights[member.parameter] = weight * factor.view(shape)
    return weights
