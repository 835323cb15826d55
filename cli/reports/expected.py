"""What a result has to be for a report to read it: a file that is otherwise is left out by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Test = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether a value is a number that a mean can be taken of."""
    if type(value) is int:
        return abs(value) < 1 << 63
    return type(value) is float and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_integer(value: Any) -> bool:
    return type(value) is int and is_number(value)


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _or_none(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _list_of(test: Test) -> Test:
    return lambda value: isinstance(value, list) and all(map(test, value))


def _named(test: Test) -> Test:
    return lambda value: isinstance(value, dict) and all(map(test, value.values()))


def _with(**tests: Test) -> Test:
    """A mapping that has these entries; those whose names end in ``_`` may be left out."""

    def whole(value: Any) -> bool:
        return isinstance(value, dict) and all(
            test(value[name.rstrip("_")]) if name.rstrip("_") in value else name.endswith("_")
            for name, test in tests.items()
        )

    return whole


def _is_histogram(value: Any) -> bool:
    if not _with(**dict.fromkeys(("log10", "kept", "removed"), _list_of(is_number)))(value):
        return False
    return len(value["kept"]) == len(value["removed"]) == len(value["log10"]) - 1


_ACCURACIES = {"source_accuracy": is_number, "target_accuracy": is_number}
_SIDE = {**_ACCURACIES, "params": _is_positive, "macs": _is_positive, "latency_ms": _is_positive}
_TRAINING = _with(
    epochs_=_or_none(_is_integer),
    best_epoch_=_or_none(_is_integer),
    start_=_or_none(_with(val_accuracy=is_number)),
)
is_result = _with(
    model=_is_text,
    metric=_is_text,
    target_domain=_is_text,
    seed=_is_integer,
    speedup=_is_positive,
    ratio_=_or_none(is_number),
    target_=_or_none(_named(is_number)),
    dense=_with(accuracy=_named(is_number), **_SIDE),
    pruned=_with(**_SIDE),
    pruned_only=_with(**_ACCURACIES),
    settings_=_with(pruning_=_is_mapping, recovery_=_or_none(_is_mapping)),
    training_=_with(pruned_=_TRAINING),
    history_=_with(pruned_=_list_of(_with(epoch=_is_integer, val_accuracy=is_number))),
    seconds_=_with(pruned_=is_number),
    groups_=_list_of(_with(name=_is_text, kind=_is_text, size=_is_positive, kept=is_number)),
    scores_=_or_none(_named(_is_histogram)),
    sweep_=_with(workers_=_is_integer),
)
"""Whether all is there, and of the kind, that a report reads."""
