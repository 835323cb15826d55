"""The training loss: cross-entropy over every head, and distillation where there is a teacher."""

from collections.abc import Callable

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional

from domains._device import all_logits, mean_logits
from domains.recipe import FinetuneSettings


def make_mixup(settings: FinetuneSettings, num_classes: int) -> Mixup | None:
    """Return timm's mixup or cutmix, or None where both are off."""
    if not (settings.mixup or settings.cutmix):
        return None
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.smoothing,
        num_classes=num_classes,
    )


def make_loss(
    settings: FinetuneSettings, teacher: nn.Module | None
) -> Callable[[Tensor | tuple[Tensor, ...], Tensor, Tensor], Tensor]:
    """Return loss(output of the model, images, targets).

    Targets are labels (batch,), or shares (batch, classes) after mixup. With a teacher,
    ``(1 - w) CE + w T^2 KL(teacher / T || student / T)``, the teacher seeing the same augmented
    images.

    References
    ----------
    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. Beyer et al.,
    "Knowledge distillation: A good teacher is patient and consistent", CVPR 2022.
    """
    hard = nn.CrossEntropyLoss(label_smoothing=settings.smoothing)
    soft = SoftTargetCrossEntropy()
    weight, temperature = settings.distill_weight, settings.distill_temperature

    def loss(output: Tensor | tuple[Tensor, ...], images: Tensor, targets: Tensor) -> Tensor:
        criterion = soft if targets.is_floating_point() else hard
        heads = [head.float() for head in all_logits(output)]
        total = torch.stack([criterion(head, targets) for head in heads]).mean()
        if teacher is None:
            return total
        with torch.no_grad():
            wanted = (mean_logits(teacher(images)).float() / temperature).log_softmax(-1)
        divergences = [
            functional.kl_div(
                (head / temperature).log_softmax(-1), wanted, log_target=True, reduction="batchmean"
            )
            for head in heads
        ]
        return (1 - weight) * total + weight * temperature**2 * torch.stack(divergences).mean()

    return loss
