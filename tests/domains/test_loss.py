import pytest
import torch
from torch import nn

from domains import FinetuneSettings
from domains.training.loss import Distillation, sample_losses

LABELS = torch.tensor([0, 1, 2, 1])


def test_the_loss_of_an_image_is_smoothed_cross_entropy():
    logits = torch.randn(4, 3)
    shares = nn.functional.one_hot(LABELS, 3) * 0.8 + 0.2 / 3
    expected = -(shares * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(sample_losses(logits, LABELS, 0.2), expected)


def test_shares_of_classes_are_not_smoothed_again():
    logits, shares = torch.randn(4, 3), torch.rand(4, 3).softmax(1)
    expected = -(shares * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(sample_losses(logits, shares, 0.2), expected)


def test_the_heads_of_a_distilled_model_count_alike():
    heads = torch.randn(4, 3), torch.randn(4, 3)
    mean = (sample_losses(heads[0], LABELS, 0.1) + sample_losses(heads[1], LABELS, 0.1)) / 2
    torch.testing.assert_close(sample_losses(heads, LABELS, 0.1), mean)


def test_a_student_like_its_teacher_has_no_distillation_loss():
    logits, features = torch.randn(4, 3), torch.randn(4, 5)
    distance = Distillation(FinetuneSettings(distill_weight=1.0, feature_weight=1.0), ((5,), (5,)))
    assert distance(logits, logits + 5, features, features).item() == pytest.approx(0, abs=1e-6)


def test_distillation_is_the_divergence_at_the_temperature_weighed_by_its_square():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    q, p = (student / 4).softmax(1), (teacher / 4).softmax(1)
    soft = (p * (p / q).log()).sum(1).mean()
    distance = Distillation(FinetuneSettings(distill_weight=0.3, distill_temperature=4.0))
    torch.testing.assert_close(distance(student, teacher), 0.3 * 16 * soft)


def test_features_of_another_width_are_compared_through_a_map_that_learns():
    settings = FinetuneSettings(distill_weight=0.0, feature_weight=2.0)
    distance = Distillation(settings, ((3,), (6,)))
    student, teacher = torch.randn(64, 3), torch.randn(64, 3) @ torch.randn(3, 6)
    logits = torch.zeros(64, 2)
    found = distance(logits, logits, student, teacher)
    mapped = student @ distance.map.weight.T
    expected = 2 * (mapped - teacher).square().mean() / teacher.square().mean()
    torch.testing.assert_close(found, expected)
    found.backward()
    assert distance.map.weight.grad.abs().sum() > 0


def test_no_gradient_reaches_the_teacher():
    wanted = torch.randn(4, 3, requires_grad=True)
    seen = torch.randn(4, 5, requires_grad=True)
    student, features = torch.randn(4, 3, requires_grad=True), torch.randn(4, 5)
    Distillation(FinetuneSettings(feature_weight=1.0), ((5,), (5,)))(
        student, wanted, features, seen
    ).backward()
    assert student.grad is not None
    assert wanted.grad is None and seen.grad is None
