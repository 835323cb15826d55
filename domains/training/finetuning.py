"""Fine-tuning on the source domains; the target has no part in it, not even in the choice.

After every epoch one checkpoint replaces the one before. Stopped at any moment and resumed, a run
on the CPU ends with the same weights, bit for bit.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from domains.data.split import Split
from domains.recipe import FinetuneSettings
from domains.running.device import accelerator, borrowed
from domains.running.processes import is_main, wait
from domains.running.progress import duration, progress_bar, tell
from domains.running.sharding import fsdp_plugin
from domains.training.checkpoint import (
    load_checkpoint,
    prepare_directory,
    run_identity,
    save_checkpoint,
)
from domains.training.epoch import EpochRunner, Hooks
from domains.training.state import EpochRow, Judgement, start


@dataclass(frozen=True)
class FinetuneResult:
    """History of a fine-tuning and the epoch whose weights the model now has.

    `best_epoch` 0 is the model as it came, where `may_keep_start` is set; `start` is what that was
    worth on the validation parts.
    """

    history: list[EpochRow]
    best_epoch: int
    best_val_accuracy: float
    seconds: float
    start: Judgement | None = None


def finetune(
    model: nn.Module,
    split: Split,
    settings: FinetuneSettings | None = None,
    directory: str | Path = "runs/finetune",
    *,
    resume: bool = False,
    progress: bool = True,
    teacher: nn.Module | None = None,
    on_epoch: Callable[[EpochRow], None] | None = None,
    hooks: Hooks | None = None,
    name: str = "training",
) -> FinetuneResult:
    """Train `model` on the source domains of `split`; it ends with its best epoch's weights.

    Parameters
    ----------
    model : nn.Module
        Maps images (batch, 3, height, width) to logits (batch, classes), or in train mode to a
        tuple of such (distilled models). Trained in place; its device and modes are put back.
    split : Split
        Only `train` and `val` are read.
    settings : FinetuneSettings or None
        None: the defaults.
    directory : path
        Gets `checkpoint.pt`, rewritten after every epoch.
    resume : bool
        Continue from the checkpoint in `directory`; where there is none, begin. False: begin anew,
        and replace any checkpoint there.
    progress : bool
        Show a progress bar on standard error; a line for each epoch where that is no terminal and
        the logger "domains" is not heard.
    teacher : nn.Module or None
        Usually the dense model: its outputs are learnt from too, as `settings` weighs them.
    on_epoch : callable or None
        Called with the row of each epoch once its checkpoint is written: never twice for one.
    hooks : Hooks or None
        What else is done to the model while it trains.
    name : str
        What the lines that are logged begin with.

    Returns
    -------
    FinetuneResult
        The best epoch is that of the highest accuracy on the source validation parts, averaged
        over domains as DomainBed does; of equals, that of the lowest validation loss. An algorithm
        that has found the end of its training (SWAD) ends the history there.

    Raises
    ------
    DepgraphError
        An unknown algorithm, a loss that is not finite, a checkpoint of another run, a disk that
        cannot be written, an unreadable image, a model whose outputs do not fit the classes. The
        last checkpoint stays.

    Notes
    -----
    KeyboardInterrupt passes through; the last complete checkpoint stays.

    Launched as several processes (``accelerate launch``, on the CPU ``torchrun``), each trains on
    its part of the same batches, and all algorithms see the whole batch; one process writes. The
    result is that of one process up to rounding, except for what is drawn while training (drop-out,
    mixup's pairs) and for batch norm, whose statistics are those of a part.

    Launched with FSDP (``--use_fsdp --fsdp_version 2``), each process holds its part of the
    weights, gradients, averages and optimiser state; a teacher, and the model while it is
    validated, are whole on each device. Mixed precision is autocast, as in one process, over
    weights and sums that stay float32. Checkpoints are whole: a run can go on with another number
    of processes, in shards or not. Hooks get the whole model, which is slow after every step.
    """
    settings = settings or FinetuneSettings()
    folder = Path(directory)
    device = accelerator(settings.device, settings.amp)
    identity = run_identity(model, split, settings, teacher, None if hooks is None else hooks.name)
    saved = load_checkpoint(folder, identity) if resume else None
    wait()  # none writes before all have read
    with ExitStack() as stack:
        # Of shards, the model itself takes room on the device only while it is judged.
        place = device.device if fsdp_plugin(device) is None else torch.device("cpu")
        stack.enter_context(borrowed(model, place, train=True))
        if teacher is not None:
            stack.enter_context(borrowed(teacher, device.device, train=False))
        bar = stack.enter_context(progress_bar(progress))
        runner = EpochRunner(model, split, settings, device, teacher, hooks, bar)
        state = start(model, settings, device, runner.algorithm, runner.distillation)
        if saved is not None:
            state.load_dict(saved["state"])
        if is_main() and len(state.history) < settings.epochs and not state.algorithm.finished:
            prepare_directory(folder)
        if settings.may_keep_start and state.before is None and not state.history:
            state.add_before(runner.judge(state))
        for epoch in range(len(state.history), settings.epochs):
            if state.algorithm.finished:
                break
            state.add(runner.run(state, epoch))
            tell(_line(name, state.history, settings.epochs), progress)
            now = state.to_dict()  # of all processes: shards are gathered
            if is_main():
                save_checkpoint(folder, {"identity": identity, "state": now})
                if on_epoch is not None:
                    on_epoch(state.history[-1])
        device.unwrap_model(state.trained, keep_fp32_wrapper=False)  # undoes what sharing changed
        model.load_state_dict(state.best)
        if settings.may_keep_start and state.best_epoch == 0:
            tell(f"{name}: no epoch was better than the model as it came, which is kept", progress)
    seconds = sum(row["seconds"] for row in state.history)
    return FinetuneResult(
        state.history,
        state.best_epoch,
        state.best_judgement["val_accuracy"],
        seconds,
        state.before,
    )


def _line(name: str, history: list[EpochRow], epochs: int) -> str:
    """What the last epoch came to, and when the last one will end."""
    row = history[-1]
    left = (epochs - row["epoch"]) * sum(past["seconds"] for past in history) / len(history)
    return (
        f"{name}: epoch {row['epoch']} of {epochs}, loss {row['train_loss']:.4f}, validation loss "
        f"{row['val_loss']:.4f}, validation accuracy {100 * row['val_accuracy']:.1f}%, "
        f"{duration(row['seconds'])} an epoch, ETA {duration(left)}"
    )
