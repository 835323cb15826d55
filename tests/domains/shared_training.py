"""Trains the same small model in several ways; launched as two processes by `test_processes`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import timm
import torch
from torch import nn

from domains import (
    FinetuneSettings,
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
}


def small_model(width: int = 16) -> nn.Module:
    """A vision transformer for 16 px images and three classes."""
    torch.manual_seed(width)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": width, "depth": 1, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **options)


def train_all(root: Path, out: Path) -> None:
    """Train every variant on the images in `root`; the main process writes what came out."""
    split = leave_one_out(load_domains(root), "photo", seed=1)
    for name, change in VARIANTS.items():
        settings = FinetuneSettings(
            epochs=2,
            batch_size=12,
            optimizer="sgd",
            lr=0.05,
            warmup_epochs=0.5,
            img_size=16,
            device="cpu",
            num_workers=0,
            **change,
        )
        model = small_model()
        teacher = small_model(24) if name == "distilled" else None
        result = finetune(
            model, split, settings, out / f"{name}-training", progress=False, teacher=teacher
        )
        accuracy = evaluate(model, split, device="cpu", img_size=16)
        if processes.is_main():
            torch.save(model.state_dict(), out / f"{name}.pt")
            row = {"history": result.history, "accuracy": accuracy}
            (out / f"{name}.json").write_text(json.dumps(row))
    processes.wait()


if __name__ == "__main__":
    train_all(Path(sys.argv[1]), Path(sys.argv[2]))
