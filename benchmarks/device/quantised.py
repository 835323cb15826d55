"""(h) Int8 by torchao and 2:4 sparsity, of the dense model and of one cut to multiples of 64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.device.models import DENSE, cuts, dense_model, images_for
from benchmarks.device.record import Record, Row
from benchmarks.device.settings import Settings, ViT
from benchmarks.device.tables import Table, digits, padded
from benchmarks.quantised import FORMS
from benchmarks.runtimes import PRECISIONS, Forward, check_compiler
from domains.measuring.stand import room_to_compile
from domains.measuring.timing import TimingSettings, in_turns

COMPILED = "torchao int8, bf16, compiled"


def run(record: Record, settings: Settings) -> None:
    """Each form of each model, in turns with the dense model in float32 and in float16."""
    model = dense_model(settings, ViT)
    step = 1 if settings.size == "tiny" else 64
    name = f"{settings.sizes.shares[0]:g} of the MACs"
    models = {DENSE: model}
    models |= {f"{cut}, multiples of {step}": small
               for cut, small, _ in cuts(settings, model, round_to=step, only=[name])}  # fmt: skip
    models = {key: each.eval().to(settings.device) for key, each in models.items()}
    record.facts.update(batch=settings.sizes.batch)
    half = "fp16" if settings.cuda else "bf16"
    base = _cast(models[DENSE], half)
    makers: dict[str, Callable[[nn.Module, Tensor], Forward]] = {
        half: lambda m, _: _cast(m, half),
        "torchao int8": FORMS["torchao int8"],
        "torchao int8, bf16": _int8_half,
        "2:4 fp16": FORMS["2:4 fp16"],
    }
    forms = [(key, form) for key in models for form in makers]
    if settings.size != "tiny":  # last, since it takes the longest
        makers[COMPILED] = _int8_compiled
        forms += [(key, COMPILED) for key in models]
    for key, form in forms:
        work = functools.partial(_row, settings, models[key], base, makers[form])
        record.attempt(f"{key}, {form}", work)


def _cast(model: nn.Module, precision: str) -> Forward:
    made, kind = copy.deepcopy(model).to(PRECISIONS[precision]), PRECISIONS[precision]
    return lambda images: made(images.to(kind)).float()


def _int8_half(model: nn.Module, images: Tensor) -> Forward:
    made = FORMS["torchao int8"](copy.deepcopy(model).bfloat16(), images.bfloat16())
    return lambda x: made(x.bfloat16()).float()


def _int8_compiled(model: nn.Module, images: Tensor) -> Forward:
    check_compiler(images)
    made = FORMS["torchao int8"](copy.deepcopy(model).bfloat16(), images.bfloat16())
    torch._dynamo.reset()
    run: Callable[[Tensor], Tensor] = torch.compile(made, dynamic=False)
    return lambda x: run(x.bfloat16()).float()


def _row(
    settings: Settings,
    model: nn.Module,
    base: Forward,
    make: Callable[[nn.Module, Tensor], Forward],
) -> Row:
    images = images_for(model, settings.sizes.batch, settings.device)
    clock = TimingSettings(1, seconds=settings.sizes.seconds, min_rounds=5, warmup_rounds=2)
    with torch.no_grad(), room_to_compile(2):
        run = make(model, images)
        expected, got = model(images), run(images)
        times = in_turns([base, run], images, clock)
    off = float((got - expected).norm() / expected.norm())
    return {
        "ms": float(np.median(times[:, 1])) * 1e3,
        "speedup": float(np.median(times[:, 0] / times[:, 1])),
        "logits_off": off,
    }


def tables(record: Record) -> list[Table]:
    """Milliseconds, speed-up over dense half precision, and distance of the logits."""
    columns = ("form", "ms", "over dense, half precision", "logits off by")
    lines: list[tuple[str, ...]] = []
    for key, row in record.rows.items():
        without = padded(key, row, len(columns))
        if without is not None:
            lines.append(without)
            continue
        lines.append((key, digits(row["ms"]), f"{row['speedup']:.2f}x", f"{row['logits_off']:.1e}"))
    says = (
        f"{ViT}, batch {record.facts.get('batch', '')}; float32 images, conversion included. "
        "Logits beside those of the same model in float32, norm of the difference over norm."
    )
    return [Table(says, columns, lines)]
