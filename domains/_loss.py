"""The training losses: cross-entropy over every head, and distillation where there is a teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from domains._device import all_logits, mean_logits
from domains._random import derive_seed, seeded
from domains.recipe import FinetuneSettings

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
    term and the features ``s`` and ``t``, what the classifiers read, in the second. ``M`` is learnt
    where the student's features have another width than the teacher's.

    Parameters
    ----------
    settings : FinetuneSettings
        Its `distill_weight` w, `distill_temperature` T and `feature_weight` v.
    widths : (int, int) or None
        Of the student's and the teacher's features; None: without features.

    References
    ----------
    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. Romero et al.,
    "FitNets: Hints for Thin Deep Nets", ICLR 2015 (the features). Beyer et al., "Knowledge
    distillation: A good teacher is patient and consistent", CVPR 2022.
    """

    def __init__(self, settings: FinetuneSettings, widths: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.weight, self.temperature = settings.distill_weight, settings.distill_temperature
        self.feature_weight = settings.feature_weight
        self.map: nn.Module = nn.Identity()
        if widths is not None and widths[0] != widths[1]:
            with seeded(derive_seed(settings.seed, "feature map")):
                self.map = nn.Linear(*widths, bias=False)
                nn.init.orthogonal_(self.map.weight)

    def forward(
        self,
        output: Output,
        wanted: Output,
        features: Tensor | None = None,
        wanted_features: Tensor | None = None,
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
        if features is None or wanted_features is None:
            return loss
        goal = wanted_features.detach().float()
        distance = (self.map(features.float()) - goal).square().mean()
        return loss + self.feature_weight * distance / goal.square().mean().clamp_min(1e-12)
