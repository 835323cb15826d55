"""The training losses: cross-entropy over every head, and distillation where there is a teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from depgraph import DepgraphError
from domains.recipe import FinetuneSettings
from domains.running.device import all_logits, mean_logits
from domains.running.random import derive_seed, seeded

Output = Tensor | tuple[Tensor, ...]


def sample_losses(output: Output, targets: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of each image, shape (batch,), the mean over the heads.

    Targets are labels (batch,), which are smoothed, or shares (batch, classes) after mixup, which
    are smooth already.
    """
    soft = targets.is_floating_point()
    losses = [
        functional.cross_entropy(
            head.float(), targets, reduction="none", label_smoothing=0.0 if soft else smoothing
        )
        for head in all_logits(output)
    ]
    return torch.stack(losses).mean(0)


class Distillation(nn.Module):
    """How far a student is from its teacher, who sees the same augmented images.

    ``w T^2 KL(teacher / T || student / T) + v |M s - t|^2 / |t|^2``, with the logits in the first
    term and the tokens ``s`` and ``t``, the last features that have places, in the second. ``M`` is
    learnt where the student's tokens have another width than the teacher's.

    Parameters
    ----------
    settings : FinetuneSettings
        Its `distill_weight` w, `distill_temperature` T and `feature_weight` v.
    shapes : (tuple of int, tuple of int) or None
        Of the student's and the teacher's tokens of one image; None: without tokens.

    Raises
    ------
    DepgraphError
        The shapes differ in more than the width.

    References
    ----------
    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. Romero et al.,
    "FitNets: Hints for Thin Deep Nets", ICLR 2015 (the features). Beyer et al., "Knowledge
    distillation: A good teacher is patient and consistent", CVPR 2022.
    """

    def __init__(
        self,
        settings: FinetuneSettings,
        shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.temperature = settings.distill_weight, settings.distill_temperature
        self.feature_weight = settings.feature_weight
        self.map: nn.Module = nn.Identity()
        self.dim = -1  # the one that the map is over
        if shapes is not None and shapes[0] != shapes[1]:
            self.dim = _width(*shapes)
            mine, theirs = (shape[self.dim] for shape in shapes)
            with seeded(derive_seed(settings.seed, "feature map")):
                self.map = nn.Linear(mine, theirs, bias=False)
                nn.init.orthogonal_(self.map.weight)

    def forward(
        self,
        output: Output,
        wanted: Output,
        tokens: Tensor | None = None,
        wanted_tokens: Tensor | None = None,
    ) -> Tensor:
        """The weighed distance, a scalar; no gradient reaches the teacher's."""
        logits = (mean_logits(wanted).detach().float() / self.temperature).log_softmax(-1)
        divergences = [
            functional.kl_div(
                (head.float() / self.temperature).log_softmax(-1),
                logits,
                log_target=True,
                reduction="batchmean",
            )
            for head in all_logits(output)
        ]
        loss = self.weight * self.temperature**2 * torch.stack(divergences).mean()
        if tokens is None or wanted_tokens is None:
            return loss
        goal = wanted_tokens.detach().float().movedim(self.dim, -1)
        distance = (self.map(tokens.float().movedim(self.dim, -1)) - goal).square().mean()
        return loss + self.feature_weight * distance / goal.square().mean().clamp_min(1e-12)


def _width(student: tuple[int, ...], teacher: tuple[int, ...]) -> int:
    """The dimension, counted from the end, in which two shapes differ."""
    if len(student) == len(teacher):
        unlike = [i - len(student) for i, n in enumerate(student) if n != teacher[i]]
        if len(unlike) == 1:
            return unlike[0]
    raise DepgraphError(
        f"the model's tokens have shape {student} an image and its teacher's {teacher}; set "
        "feature_weight to 0"
    )
