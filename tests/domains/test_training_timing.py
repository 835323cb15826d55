from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from depgraph import DepgraphError
from domains.measuring.timing import TimingSettings
from domains.measuring.training_timing import compare_training

QUICK = TimingSettings(batch_size=2, seconds=0, min_rounds=2, warmup_rounds=1)


def vit(depth: int) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, num_heads=2, depth=depth
    )


def test_steps_are_timed_and_the_models_learn_nothing() -> None:
    models = {"dense": vit(2).eval(), "pruned": vit(1).eval()}
    before = {name: model.head.weight.clone() for name, model in models.items()}
    result = compare_training(models, (3, 32, 32), QUICK)
    assert list(result) == ["dense", "pruned"]
    for name, measured in result.items():
        assert measured.steps_per_second == pytest.approx(1e3 / measured.step_ms)
        assert torch.equal(models[name].head.weight, before[name])
        assert not models[name].training and models[name].head.weight.grad is None
    assert result["dense"].peak_memory_bytes > result["pruned"].peak_memory_bytes


def test_checkpointing_and_mixed_precision_are_said_in_the_result() -> None:
    settings = TimingSettings(batch_size=8, seconds=0, min_rounds=1, warmup_rounds=1, amp="bf16")
    model = {"dense": vit(4)}
    kept = compare_training(model, (3, 32, 32), settings)["dense"]
    again = compare_training(model, (3, 32, 32), settings, checkpointing=True)["dense"]
    assert again.checkpointed and again.dtype == "amp-bf16"
    assert again.peak_memory_bytes < kept.peak_memory_bytes


def test_what_cannot_train_is_refused() -> None:
    with pytest.raises(DepgraphError, match="no set_grad_checkpointing"):
        compare_training({"a": nn.Linear(4, 2)}, (4,), QUICK, checkpointing=True)
    with pytest.raises(DepgraphError, match=r"'a' does not train on a batch of shape \(2, 5\)"):
        compare_training({"a": nn.Linear(4, 2)}, (5,), QUICK)
    frozen = nn.Linear(4, 2).requires_grad_(False)
    with pytest.raises(DepgraphError, match="every parameter of a model is frozen"):
        compare_training({"a": frozen}, (4,), QUICK)
