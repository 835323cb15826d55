"""How long models take in terms of each other, called with any inputs; `timing` knows images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from domains.measuring.stand import DTYPES, borrowed, cpu_threads, find_device
from domains.measuring.timing import TimingSettings, in_turns


def time_in_turns(
    models: Sequence[nn.Module],
    example: tuple[tuple[Any, ...], Mapping[str, Any]],
    settings: TimingSettings,
    batch: int | None = None,
) -> np.ndarray:
    """Time models in turns.

    Parameters
    ----------
    models : sequence of nn.Module
        Left as they are.
    example : tuple of (args, kwargs)
        What they are called with; of its tensors only shapes and dtypes are used.
    settings : TimingSettings
        Its batch size, device, threads, dtype, rounds and seconds.
    batch : int, optional
        Size of the leading dimension of the example's tensors that is the batch.

    Returns
    -------
    ndarray of float, shape (rounds, models)
        Seconds of each forward.
    """
    device = find_device(settings.device)
    dtype = DTYPES[settings.dtype]
    draw = torch.Generator().manual_seed(0)

    def made(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        leading = [settings.batch_size if n == batch else n for n in value.shape[:1]]
        if value.is_floating_point():
            return torch.randn(*leading, *value.shape[1:], generator=draw).to(device, dtype)
        return torch.zeros(*leading, *value.shape[1:], device=device, dtype=value.dtype)

    args, kwargs = pytree.tree_map(made, example)
    with ExitStack() as stack:
        stack.enter_context(cpu_threads(settings.threads))
        stack.enter_context(torch.inference_mode())
        form = (device, settings.dtype, False)
        ready = [
            stack.enter_context(borrowed(str(i), model, *form)) for i, model in enumerate(models)
        ]
        runs = [lambda _, model=model: model(*args, **kwargs) for model in ready]
        return in_turns(runs, torch.empty(0, device=device), settings)
