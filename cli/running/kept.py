"""Which weights a training after a cut ended with: an epoch's, or those it started from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRAINED, START, UNTRAINED = "trained", "start", "untrained"


def kept(row: Mapping[str, Any]) -> str:
    """What the pruned model of a result is: `TRAINED`, or its `START`, or `UNTRAINED`.

    Parameters
    ----------
    row : mapping
        As `run` writes it; in rows of earlier versions an epoch is taken to have been kept.
    """
    training = row.get("training", {}).get("pruned", {})
    if training.get("epochs") == 0:
        return UNTRAINED
    return START if training.get("best_epoch", 1) == 0 else TRAINED


def start(row: Mapping[str, Any]) -> float | None:
    """Validation accuracy of the cut model before it was trained, where that was measured."""
    judged = row.get("training", {}).get("pruned", {}).get("start")
    return None if judged is None else float(judged["val_accuracy"])


def as_cut(row: Mapping[str, Any]) -> str:
    """How the model is called that no epoch was better than."""
    compensated = row.get("settings", {}).get("pruning", {}).get("compensate") is not False
    return "kept as compensated" if compensated else "kept as cut"


def pruned_says(row: Mapping[str, Any]) -> str:
    """The pruned model of a result, for the head of a column or a legend."""
    last = {TRAINED: "fine-tuned", UNTRAINED: "not trained"}.get(kept(row)) or as_cut(row)
    return f"pruned, {last}"


def selection_says(row: Mapping[str, Any]) -> str:
    """What was selected on what, in sentences."""
    training = row.get("training", {}).get("pruned", {})
    judged = "by the mean accuracy on held-out images of the source domains"
    epochs, which = training.get("epochs"), kept(row)
    if which == UNTRAINED:
        return "Not trained after the cut; nothing was selected."
    if which == START:
        said = as_cut(row).capitalize()
        return f"{said}; training did not improve it in {epochs} epochs, judged {judged}."
    settings = row.get("settings", {})
    recipe = settings.get("recovery") or settings
    if recipe.get("keep") == "last":
        return "The weights are those of the last epoch; nothing was selected."
    if training.get("best_epoch") is None:
        return f"The epoch was chosen {judged}."
    return f"The weights are those of epoch {training['best_epoch']} of {epochs}, chosen {judged}."
