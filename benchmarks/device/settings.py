"""What is measured at which size: all of it, ``--quick``, or ``--tiny`` as the tests do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Case = tuple[str, int, str]
"""Precision, batch size and runtime."""

ViT, DeiT, BEiT = "ViT-B", "DeiT-B", "BEiT-B"
NAMES = {
    ViT: "vit_base_patch16_224",
    DeiT: "deit_base_patch16_224",
    BEiT: "beit_base_patch16_224",
}


def cases(precisions: str, batches: tuple[int, ...], *runtimes: str) -> tuple[Case, ...]:
    """All combinations; the first precisions and batches come first in each runtime."""
    return tuple((p, b, r) for r in runtimes for p in precisions.split() for b in batches)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes
    ----------
    budget : float
        Seconds for everything, unless the command says otherwise.
    ratios, shares : tuple of float
        Cuts: units removed; MACs kept.
    plain, auto, compiled : dict of str to tuple of Case
        What is timed, by model: of cuts as they are, of those of ``--round-to auto``, and by
        ``torch.compile``.
    seconds : float
        Of each measurement in turns.
    models : tuple of str
        For training and the engine.
    batch : int
        For training and for what is quantised.
    table : Case
        What the latency table is of; the runtime has no part in it.
    plans : int
        Random plans that its prediction is compared on.
    samples : int
        Images that metrics score with.
    seeds, epochs, targets : int
        Of the accuracy grid.
    width : dict of str to int
        Arguments that make the models smaller than they are called.
    smoke : str
        Tests to look for those of CUDA in.
    """

    budget: float
    ratios: tuple[float, ...]
    shares: tuple[float, ...]
    plain: Mapping[str, tuple[Case, ...]]
    auto: Mapping[str, tuple[Case, ...]]
    compiled: Mapping[str, tuple[Case, ...]]
    seconds: float
    models: tuple[str, ...]
    batch: int
    table: Case
    plans: int
    samples: int
    seeds: int
    epochs: int
    targets: int | None = None
    width: Mapping[str, Any] = field(default_factory=dict)
    smoke: str = "tests"


_MOST = ("bf16 fp16 fp32", (64, 1, 256, 8), "eager", "cudagraph")
_FEW = ("bf16 fp16", (64, 1), "eager", "cudagraph")
_GPU = Sizes(
    budget=480,
    ratios=(0.5, 0.75, 0.95),
    shares=(0.5, 0.25),
    plain={ViT: cases(*_MOST), BEiT: cases(*_MOST), DeiT: cases(*_MOST)},
    auto={ViT: cases(*_MOST), BEiT: cases(*_FEW), DeiT: cases(*_FEW)},
    compiled={ViT: cases("bf16", (64, 1), "compile")},
    seconds=0.5,
    models=(ViT, BEiT, DeiT),
    batch=64,
    table=("bf16", 64, "eager"),
    plans=15,
    samples=64,
    seeds=3,
    epochs=3,
)
_GPU_QUICK = Sizes(
    budget=180,
    ratios=(0.5, 0.75, 0.95),
    shares=(0.5, 0.25),
    plain={
        ViT: cases("bf16 fp32", (64, 1), "eager", "cudagraph"),
        BEiT: cases("bf16", (64, 1), "eager", "cudagraph"),
        DeiT: cases("bf16", (64,), "eager", "cudagraph"),
    },
    auto={ViT: cases("bf16", (64, 1), "eager", "cudagraph")},
    compiled={ViT: cases("bf16", (64,), "compile")},
    seconds=0.3,
    models=(ViT,),
    batch=64,
    table=("bf16", 64, "eager"),
    plans=6,
    smoke="tests/test_cuda.py",
    samples=64,
    seeds=1,
    epochs=1,
)
_CPU = Sizes(
    budget=float("inf"),
    ratios=(0.5, 0.75, 0.95),
    shares=(0.5, 0.25),
    plain={name: cases("fp32 bf16", (1, 8), "eager", "cudagraph") for name in NAMES},
    auto={name: cases("fp32", (1, 8), "eager") for name in NAMES},
    compiled={ViT: cases("fp32", (1,), "compile")},
    seconds=5.0,
    models=(ViT, BEiT, DeiT),
    batch=4,
    table=("fp32", 1, "eager"),
    plans=10,
    samples=16,
    seeds=3,
    epochs=3,
)
_CPU_QUICK = Sizes(
    budget=float("inf"),
    ratios=(0.5, 0.75, 0.95),
    shares=(0.5, 0.25),
    plain={
        ViT: cases("fp32 bf16", (1, 8), "eager", "cudagraph"),
        BEiT: cases("fp32", (1,), "eager"),
        DeiT: cases("fp32", (1,), "eager"),
    },
    auto={ViT: cases("fp32", (1,), "eager")},
    compiled={ViT: cases("fp32", (1,), "compile")},
    seconds=0.5,
    models=(ViT,),
    batch=4,
    table=("fp32", 1, "eager"),
    plans=4,
    samples=16,
    seeds=1,
    epochs=1,
    width={"embed_dim": 192, "num_heads": 3, "depth": 6},
)
_TINY = Sizes(
    budget=float("inf"),
    ratios=(0.5,),
    shares=(0.5,),
    plain={ViT: cases("fp32", (1, 2), "eager", "cudagraph"), BEiT: cases("fp32", (1,), "eager")},
    auto={ViT: cases("fp32", (1,), "eager")},
    compiled={},
    seconds=0.0,
    models=(ViT,),
    batch=2,
    table=("fp32", 1, "eager"),
    plans=1,
    samples=4,
    seeds=1,
    epochs=1,
    targets=1,
    width={"img_size": 32, "patch_size": 16, "embed_dim": 64, "num_heads": 2, "depth": 1},
    smoke="tests/test_cuda.py",
)


@dataclass(frozen=True)
class Settings:
    """What the command was asked for; plain, so that it goes to another process.

    Attributes
    ----------
    out : Path
    device : str
    size : str
        ``"full"``, ``"quick"`` or ``"tiny"``.
    data : Path, optional
        Folder of images for the accuracy grid.
    weights : Path, optional
        Of the model that is trained on it; random ones without.
    model : str
        timm name of that model.
    """

    out: Path
    device: str
    size: str
    data: Path | None = None
    weights: Path | None = None
    model: str = NAMES[ViT]

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def sizes(self) -> Sizes:
        """How much is measured."""
        if self.size == "tiny":
            return _TINY
        if self.size == "quick":
            return _GPU_QUICK if self.cuda else _CPU_QUICK
        return _GPU if self.cuda else _CPU
