"""Fine-tuning on the source domains; the target has no part in it, not even in the choice.

After every epoch one checkpoint replaces the one before. Stopped at any moment and resumed, a run
on the CPU ends with the same weights, bit for bit.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from domains._checkpoint import load_checkpoint, prepare_directory, run_identity, save_checkpoint
from domains._device import accelerator, borrowed
from domains._epoch import EpochRow, EpochRunner, start
from domains._progress import progress_bar
from domains.recipe import FinetuneSettings
from domains.split import Split


@dataclass(frozen=True)
class FinetuneResult:
    """History of a fine-tuning and the epoch whose weights the model now has.

    `best_epoch` 0 is the model as it came, where `may_keep_start` is set.
    """

    history: list[EpochRow]
    best_epoch: int
    best_val_accuracy: float
    seconds: float


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
        Show a progress bar on standard error.
    teacher : nn.Module or None
        Usually the dense model: its outputs are learnt from too, as `settings` weighs them.
    on_epoch : callable or None
        Called with the row of each epoch once its checkpoint is written: never twice for one.

    Returns
    -------
    FinetuneResult
        The best epoch is that of the highest accuracy on the source validation parts, averaged
        over domains as DomainBed does; of equals, that of the lowest validation loss.

    Raises
    ------
    DepgraphError
        A loss that is not finite, a checkpoint of another run, a disk that cannot be written, an
        unreadable image, a model whose outputs do not fit the classes. The last checkpoint stays.

    Notes
    -----
    KeyboardInterrupt passes through; the last complete checkpoint stays.
    """
    settings = settings or FinetuneSettings()
    folder = Path(directory)
    prepare_directory(folder)
    identity = run_identity(model, split, settings, teacher)
    saved = load_checkpoint(folder, identity) if resume else None
    device = accelerator(settings.device, settings.amp)
    with ExitStack() as stack:
        stack.enter_context(borrowed(model, device.device, train=True))
        if teacher is not None:
            stack.enter_context(borrowed(teacher, device.device, train=False))
        bar = stack.enter_context(progress_bar(progress))
        runner = EpochRunner(model, split, settings, device, teacher, bar)
        state = start(model, settings, device, len(runner.order))
        if saved is not None:
            state.load_dict(saved["state"])
        if settings.may_keep_start and state.before is None and not state.history:
            state.add_before(runner.judge(state))
        for epoch in range(len(state.history), settings.epochs):
            state.add(runner.run(state, epoch))
            save_checkpoint(folder, {"identity": identity, "state": state.to_dict()})
            if on_epoch is not None:
                on_epoch(state.history[-1])
        model.load_state_dict(state.best)
    seconds = sum(row["seconds"] for row in state.history)
    return FinetuneResult(
        state.history, state.best_epoch, state.best_judgement["val_accuracy"], seconds
    )
