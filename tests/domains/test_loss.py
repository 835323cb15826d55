import pytest
import torch
from torch import nn

from domains import FinetuneSettings
from domains._loss import make_loss, make_mixup

IMAGES = torch.zeros(4, 3, 2, 2)
LABELS = torch.tensor([0, 1, 2, 1])


class Constant(nn.Module):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits


def test_without_teacher_it_is_smoothed_cross_entropy():
    logits = torch.randn(4, 3)
    loss = make_loss(FinetuneSettings(smoothing=0.2), None)(logits, IMAGES, LABELS)
    shares = nn.functional.one_hot(LABELS, 3) * 0.8 + 0.2 / 3
    torch.testing.assert_close(loss, -(shares * logits.log_softmax(1)).sum(1).mean())


def test_the_heads_of_a_distilled_model_count_alike():
    heads = torch.randn(4, 3), torch.randn(4, 3)
    loss = make_loss(FinetuneSettings(), None)
    mean = (loss(heads[0], IMAGES, LABELS) + loss(heads[1], IMAGES, LABELS)) / 2
    torch.testing.assert_close(loss(heads, IMAGES, LABELS), mean)


def test_a_student_like_its_teacher_has_no_distillation_loss():
    logits = torch.randn(4, 3)
    loss = make_loss(FinetuneSettings(distill_weight=1.0), Constant(logits + 5))
    assert loss(logits, IMAGES, LABELS).item() == pytest.approx(0, abs=1e-6)


def test_distillation_is_the_divergence_at_the_temperature_weighed_by_its_square():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    settings = FinetuneSettings(distill_weight=0.3, distill_temperature=4.0)
    hard = make_loss(settings, None)(student, IMAGES, LABELS)
    q, p = (student / 4).softmax(1), (teacher / 4).softmax(1)
    soft = (p * (p / q).log()).sum(1).mean()
    loss = make_loss(settings, Constant(teacher))(student, IMAGES, LABELS)
    torch.testing.assert_close(loss, 0.7 * hard + 0.3 * 16 * soft)


def test_no_gradient_reaches_the_teacher():
    teacher = Constant(nn.Parameter(torch.randn(4, 3)))
    student = torch.randn(4, 3, requires_grad=True)
    make_loss(FinetuneSettings(), teacher)(student, IMAGES, LABELS).backward()
    assert student.grad is not None
    assert teacher.logits.grad is None


def test_mixup_gives_soft_targets_that_the_loss_takes():
    settings = FinetuneSettings(mixup=0.5, cutmix=1.0, smoothing=0.0)
    mixup = make_mixup(settings, 3)
    assert mixup is not None
    images, targets = mixup(torch.randn(4, 3, 8, 8), LABELS)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    logits = torch.randn(4, 3)
    loss = make_loss(settings, None)(logits, images, targets)
    torch.testing.assert_close(loss, -(targets * logits.log_softmax(1)).sum(1).mean())


def test_mixup_is_off_unless_asked_for():
    assert make_mixup(FinetuneSettings(), 3) is None
