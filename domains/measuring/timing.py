"""Latency, throughput and peak memory of several models, timed in turns so that noise hits all.

What is timed is one forward pass in inference mode on a random batch that is already on the device.
The models take turns round by round; the speed-up is the median of the ratios within the rounds.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor, nn

from depgraph import DepgraphError
from domains.measuring.memory import forward_peak_bytes, weights_bytes
from domains.measuring.paired import paired
from domains.measuring.stand import (
    DTYPES,
    borrowed,
    cpu_threads,
    device_name,
    find_device,
    random_images,
    room_to_compile,
)

Forward = Callable[[Tensor], object]

AMP = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TimingSettings:
    """How to time.

    Parameters
    ----------
    batch_size : int
        Images per forward pass.
    device : str
        ``"cpu"``, ``"cuda"`` or ``"cuda:N"``. A model that is elsewhere is copied there.
    threads : int or None
        CPU threads of one operation, put back afterwards; None: as torch is set.
    seconds : float
        Time for the measured rounds of all models together; the round that crosses it is the last.
    min_rounds : int
        Measured rounds at least, however long they take.
    warmup_rounds : int
        Rounds that are run and forgotten first, at least one.
    dtype : str
        ``"float32"``, ``"float16"`` or ``"bfloat16"``: weights and images are converted to it.
    amp : str or None
        ``"fp16"`` or ``"bf16"``: autocast instead of a conversion.
    channels_last : bool
        Images and convolution weights in the NHWC layout.
    compile : bool
        Time ``torch.compile(model, dynamic=False)``; it compiles during the warm-up.
    seed : int
        Seed of the random images.
    """

    batch_size: int = 1
    device: str = "cpu"
    threads: int | None = None
    seconds: float = 10.0
    min_rounds: int = 10
    warmup_rounds: int = 3
    dtype: str = "float32"
    amp: str | None = None
    channels_last: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot be timed."""
        for name in ("batch_size", "min_rounds", "warmup_rounds"):
            if getattr(self, name) < 1:
                raise DepgraphError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.threads is not None and self.threads < 1:
            raise DepgraphError(f"threads is {self.threads}; give at least 1, or None")
        if self.dtype not in DTYPES:
            raise DepgraphError(f"unknown dtype '{self.dtype}'; choose one of {', '.join(DTYPES)}")
        if self.amp is not None and self.amp not in AMP:
            raise DepgraphError(f"unknown amp '{self.amp}'; choose one of {', '.join(AMP)}")
        if self.amp is not None and self.dtype != "float32":
            raise DepgraphError(f"amp '{self.amp}' needs dtype 'float32', not '{self.dtype}'")


@dataclass(frozen=True)
class Timing:
    """What was measured of one model; plain data, so ``dataclasses.asdict`` of it goes to JSON.

    Parameters
    ----------
    latency_ms : float
        Milliseconds for one batch. Of the first model the median over the rounds; of another one
        that median divided by its speed-up: what it takes in a round where the first takes that.
        So latencies and speed-ups agree, and noise that all models met has no part in either.
    median_ms, latency_iqr_ms, latency_min_ms, latency_max_ms : float
        Median, interquartile range and extremes over the rounds of the model by itself.
    throughput : float
        Images per second at `latency_ms`.
    speedup : float
        Median over the rounds of (time of the first model / time of this one), 1 for the first.
    speedup_interval : tuple of two floats
        Its 95% confidence interval by order statistics, for rounds that are independent.
    peak_memory_bytes : int
        Weights and buffers, plus the most that one forward pass had allocated at once from torch's
        allocator of that device, after a first pass. Not in it: the input batch, the code, and
        what oneDNN on the CPU takes without the allocator.
    weights_bytes : int
        The part of it that is weights and buffers.
    rounds, batch_size : int
        Measured rounds; images per batch.
    device, device_name, dtype, torch_version : str
        Where and in what the model ran; `dtype` is ``"amp-fp16"`` or ``"amp-bf16"`` with autocast.
    threads : int
        CPU threads in force.
    channels_last, compiled : bool
        As in the settings.
    """

    latency_ms: float
    median_ms: float
    latency_iqr_ms: float
    latency_min_ms: float
    latency_max_ms: float
    throughput: float
    speedup: float
    speedup_interval: tuple[float, float]
    peak_memory_bytes: int
    weights_bytes: int
    rounds: int
    batch_size: int
    device: str
    device_name: str
    dtype: str
    threads: int
    channels_last: bool
    compiled: bool
    torch_version: str


def compare(
    models: Mapping[str, nn.Module],
    input_shape: Sequence[int],
    settings: TimingSettings | None = None,
) -> dict[str, Timing]:
    """Time several models in turns.

    Parameters
    ----------
    models : mapping of str to nn.Module
        The first one is what the speed-ups refer to.
    input_shape : sequence of int
        Shape of one image, without the batch: ``(3, 224, 224)``.
    settings : TimingSettings, optional
        Default: one image on the CPU in float32, ten seconds.

    Returns
    -------
    dict of str to Timing
        In the order of `models`.

    Raises
    ------
    DepgraphError
        No model, a device that is not there, or a model that does not run on such an input.

    Notes
    -----
    The models are left as they were: where device, dtype or memory format differ a copy is timed,
    and train mode is put back module by module, on an interrupt too. Each round starts with
    another model, so that none is always the one to find the caches cold.
    """
    settings = settings or TimingSettings()
    device = find_device(settings.device)
    if not models:
        raise DepgraphError("no model to time; give at least one, by name")
    with ExitStack() as stack:
        stack.enter_context(cpu_threads(settings.threads))
        stack.enter_context(torch.inference_mode())
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if settings.amp:
            stack.enter_context(torch.autocast(device.type, dtype=AMP[settings.amp]))
        if settings.compile:
            stack.enter_context(room_to_compile(len(models)))
        form = (device, settings.dtype, settings.channels_last)
        images = random_images((settings.batch_size, *input_shape), *form, settings.seed)
        ready = {
            name: stack.enter_context(borrowed(name, model, *form))
            for name, model in models.items()
        }
        runs = {name: _runnable(model, settings) for name, model in ready.items()}
        for name, run in runs.items():
            _first_run(name, run, images)
        forward_bytes = [forward_peak_bytes(run, images) for run in runs.values()]
        times = in_turns(list(runs.values()), images, settings)
        return {
            name: _timing(times, i, weights_bytes(ready[name]), forward_bytes[i], settings, device)
            for i, name in enumerate(runs)
        }


def _timing(
    times: np.ndarray,
    column: int,
    held_bytes: int,
    forward_bytes: int,
    settings: TimingSettings,
    device: torch.device,
) -> Timing:
    own = times[:, column]
    low, high = np.percentile(own, [25, 75])
    seconds, speedup, interval = paired(times, column)
    return Timing(
        latency_ms=seconds * 1e3,
        median_ms=float(np.median(own)) * 1e3,
        latency_iqr_ms=float(high - low) * 1e3,
        latency_min_ms=float(own.min()) * 1e3,
        latency_max_ms=float(own.max()) * 1e3,
        throughput=settings.batch_size / seconds,
        speedup=speedup,
        speedup_interval=interval,
        peak_memory_bytes=held_bytes + forward_bytes,
        weights_bytes=held_bytes,
        rounds=len(own),
        batch_size=settings.batch_size,
        device=str(device),
        device_name=device_name(device),
        dtype=f"amp-{settings.amp}" if settings.amp else settings.dtype,
        threads=torch.get_num_threads(),
        channels_last=settings.channels_last,
        compiled=settings.compile,
        torch_version=str(torch.__version__),
    )


def _runnable(model: nn.Module, settings: TimingSettings) -> Forward:
    return torch.compile(model, dynamic=False) if settings.compile else model


def _first_run(name: str, run: Forward, images: Tensor) -> None:
    try:
        run(images)
    except (RuntimeError, AssertionError, TypeError, ValueError) as err:
        reason = str(err).strip().partition("\n")[0]
        raise DepgraphError(
            f"model '{name}' does not run on a batch of shape {tuple(images.shape)}: {reason}; "
            "check the image size, or choose a smaller batch if memory ran out"
        ) from err


def in_turns(runs: Sequence[Forward], images: Tensor, settings: TimingSettings) -> np.ndarray:
    """Time functions of a batch round by round.

    Parameters
    ----------
    runs : sequence of callable
        Already warm, and on the device of the batch.
    images : Tensor
    settings : TimingSettings
        Its rounds and seconds; the rest has no part in it.

    Returns
    -------
    ndarray of float, shape (rounds, functions)
        Seconds of each measured round.
    """
    clock = _cuda_seconds if images.is_cuda else _cpu_seconds
    times: list[list[float]] = []
    start = time.perf_counter()
    for number in count(-settings.warmup_rounds):
        if number == 0:
            start = time.perf_counter()
        if number >= settings.min_rounds and time.perf_counter() - start >= settings.seconds:
            break
        row = [0.0] * len(runs)
        for turn in range(len(runs)):
            i = (turn + number) % len(runs)
            row[i] = clock(runs[i], images)
        if number >= 0:
            times.append(row)
    return np.array(times)


def _cpu_seconds(run: Forward, images: Tensor) -> float:
    start = time.perf_counter()
    run(images)
    return time.perf_counter() - start


def _cuda_seconds(run: Forward, images: Tensor) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(images.device)
    start.record()
    run(images)
    end.record()
    torch.cuda.synchronize(images.device)
    return start.elapsed_time(end) / 1e3
