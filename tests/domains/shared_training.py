"""Trains the same small model in several ways; launched as two processes by `test_processes`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from domains import (
    FinetuneSettings,
    Hooks,
    Split,
    evaluate,
    finetune,
    leave_one_out,
    load_domains,
    processes,
)

VARIANTS = {
    "erm": {},
    "coral": {"algorithm": "coral", "algorithm_args": {"penalty": 10.0}},
    "groupdro": {"algorithm": "groupdro", "algorithm_args": {"step_size": 1.0}},
    "swad": {"algorithm": "swad", "algorithm_args": {"checks": 2, "patience_start": 2}},
    "distilled": {"feature_weight": 0.5, "ema_decay": 0.9},
    "layers": {"layer_decay": 0.5, "clip_grad": 0.01, "optimizer": "lamb", "ema_decay": 0.9},
    "hooked": {},
    "half": {"amp": True},
}


def small_model(width: int = 16) -> nn.Module:
    """A vision transformer for 16 px images and three classes."""
    torch.manual_seed(width)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": width, "depth": 1, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **options)


def settings_of(name: str) -> FinetuneSettings:
    """Settings of a variant: SGD, whose steps are as near as the gradients are."""
    settings = FinetuneSettings(
        epochs=2,
        batch_size=12,
        optimizer="sgd",
        lr=0.05,
        warmup_epochs=0.5,
        img_size=16,
        device="cpu",
        num_workers=0,
    )
    return replace(settings, **VARIANTS[name])


@torch.no_grad()
def _halve_first_row(model: nn.Module, *_: float) -> None:
    model.get_parameter("head.weight")[0] /= 2


HOOKS = Hooks("halved", after_step=_halve_first_row, after_epoch=_halve_first_row)


def train(name: str, split: Split, folder: Path, **more: object) -> tuple[nn.Module, list]:
    """The model of a variant after training, and the history."""
    model = small_model()
    result = finetune(
        model,
        split,
        settings_of(name),
        folder,
        progress=False,
        teacher=small_model(24) if name == "distilled" else None,
        hooks=HOOKS if name == "hooked" else None,
        **more,
    )
    return model, result.history


def train_all(root: Path, out: Path) -> None:
    """Train every variant on the images in `root`; the main process writes what came out."""
    split = leave_one_out(load_domains(root), "photo", seed=1)
    for name in VARIANTS:
        model, history = train(name, split, out / f"{name}-training")
        accuracy = evaluate(model, split, device="cpu", img_size=16)
        assert all(type(p) is nn.Parameter for p in model.parameters())
        weights: dict[str, Tensor] = model.state_dict()
        if processes.is_main():
            torch.save(weights, out / f"{name}.pt")
            row = {"history": history, "accuracy": accuracy}
            (out / f"{name}.json").write_text(json.dumps(row))
        processes.wait()
        saved = torch.load(out / f"{name}.pt", weights_only=True)
        assert all(torch.equal(value, saved[key]) for key, value in weights.items())
    processes.wait()


if __name__ == "__main__":
    train_all(Path(sys.argv[1]), Path(sys.argv[2]))
