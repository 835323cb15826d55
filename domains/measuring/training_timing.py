"""Steps per second and peak memory of training, of several models in turns.

A step is forward, cross entropy, backward and AdamW's update on a random batch. The models that are
timed are copies: the caller's do not learn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depgraph import DepgraphError
from domains.measuring.memory import forward_peak_bytes, weights_bytes
from domains.measuring.paired import paired
from domains.measuring.stand import cpu_threads, find_device, random_images, room_to_compile
from domains.measuring.timing import AMP, TimingSettings, in_turns
from domains.running.device import all_logits


@dataclass(frozen=True)
class TrainingTiming:
    """What training one model costs.

    Parameters
    ----------
    step_ms : float
        Of the first model the median over the rounds; of another one that median divided by its
        speed-up, as in `timing.Timing`.
    steps_per_second, images_per_second : float
        At `step_ms`.
    speedup : float
        Median over the rounds of (time of the first model / time of this one).
    speedup_interval : tuple of two floats
        Its 95% confidence interval.
    peak_memory_bytes : int
        Weights, plus the most that one step had allocated at once after a first step, which made
        the optimiser's state; on the CPU without what oneDNN takes for itself.
    rounds, batch_size : int
        Measured rounds; images a step.
    dtype : str
        ``"float32"``, ``"amp-bf16"`` or ``"amp-fp16"``.
    compiled, checkpointed : bool
    """

    step_ms: float
    steps_per_second: float
    images_per_second: float
    speedup: float
    speedup_interval: tuple[float, float]
    peak_memory_bytes: int
    rounds: int
    batch_size: int
    dtype: str
    compiled: bool
    checkpointed: bool


def compare_training(
    models: Mapping[str, nn.Module],
    input_shape: Sequence[int],
    settings: TimingSettings | None = None,
    *,
    checkpointing: bool = False,
) -> dict[str, TrainingTiming]:
    """Time training steps of several models in turns.

    Parameters
    ----------
    models : mapping of str to nn.Module
        The first one is what the speed-ups refer to.
    input_shape : sequence of int
        Of one image, without the batch.
    settings : TimingSettings, optional
        Of it: batch size, device, threads, seconds, rounds, amp, compile and seed.
    checkpointing : bool
        Compute activations again in the backward pass rather than keep them, as timm's models do.

    Returns
    -------
    dict of str to TrainingTiming
        In the order of `models`.

    Raises
    ------
    DepgraphError
        No model, a device that is not there, a model that cannot checkpoint, or one whose step
        does not run.
    """
    settings = settings or TimingSettings()
    if not models:
        raise DepgraphError("no model to time; give at least one, by name")
    if settings.dtype != "float32" or settings.channels_last:
        raise DepgraphError("training is timed in float32 weights; choose mixed precision by amp")
    device = find_device(settings.device)
    with ExitStack() as stack:
        stack.enter_context(cpu_threads(settings.threads))
        if settings.compile:
            stack.enter_context(room_to_compile(2 * len(models)))
        shape = (settings.batch_size, *input_shape)
        images = random_images(shape, device, "float32", False, settings.seed)
        ready = {
            name: _trainee(name, model, device, checkpointing) for name, model in models.items()
        }
        steps = {name: _step(model, images, settings) for name, model in ready.items()}
        for name, step in steps.items():
            _first(name, step, images)
        peaks = [forward_peak_bytes(step, images) for step in steps.values()]
        times = in_turns(list(steps.values()), images, settings)
    found = [paired(times, i) for i in range(len(ready))]
    return {
        name: TrainingTiming(
            step_ms=found[i][0] * 1e3,
            steps_per_second=1 / found[i][0],
            images_per_second=settings.batch_size / found[i][0],
            speedup=found[i][1],
            speedup_interval=found[i][2],
            peak_memory_bytes=weights_bytes(ready[name]) + peaks[i],
            rounds=len(times),
            batch_size=settings.batch_size,
            dtype=f"amp-{settings.amp}" if settings.amp else "float32",
            compiled=settings.compile,
            checkpointed=checkpointing,
        )
        for i, name in enumerate(ready)
    }


def _trainee(name: str, model: nn.Module, device: torch.device, checkpointing: bool) -> nn.Module:
    model = copy.deepcopy(model).to(device).float().train()
    if checkpointing:
        enable: Any = getattr(model, "set_grad_checkpointing", None)
        if enable is None:
            raise DepgraphError(
                f"model '{name}' has no set_grad_checkpointing, as timm's have; leave it out"
            )
        enable(True)
    return model


def _step(model: nn.Module, images: Tensor, settings: TimingSettings) -> Callable[[Tensor], object]:
    learning = [p for p in model.parameters() if p.requires_grad]
    if not learning:
        raise DepgraphError("every parameter of a model is frozen; set requires_grad on some")
    optimizer = torch.optim.AdamW(learning, lr=1e-6)
    scaler = torch.amp.GradScaler(images.device.type, enabled=settings.amp == "fp16")
    run: Callable[[Tensor], Any] = (
        torch.compile(model, dynamic=False) if settings.compile else model
    )
    kind = images.device.type

    def step(batch: Tensor) -> object:
        amp = torch.autocast(kind, dtype=AMP[settings.amp]) if settings.amp else nullcontext()
        with amp:
            outputs = all_logits(run(batch))
            losses = [F.cross_entropy(logits, _labels(logits)) for logits in outputs]
        loss: Tensor = scaler.scale(torch.stack(losses).sum())
        loss.backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return None

    return step


def _labels(logits: Tensor) -> Tensor:
    return torch.arange(len(logits), device=logits.device) % logits.shape[-1]


def _first(name: str, step: Callable[[Tensor], object], images: Tensor) -> None:
    try:
        step(images)
    except (RuntimeError, AssertionError, TypeError, ValueError) as err:
        reason = str(err).strip().partition("\n")[0]
        raise DepgraphError(
            f"model '{name}' does not train on a batch of shape {tuple(images.shape)}: {reason}; "
            "choose a smaller batch if memory ran out"
        ) from err
