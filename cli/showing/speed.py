"""How a speed-up is said: faster, slower or neither, with its interval; none is 0.95x faster."""

from __future__ import annotations

from collections.abc import Sequence

PAIRED = (
    "Both took turns for {rounds} rounds. Speed: median of the ratios within rounds, with its 95% "
    "interval. Time: of the dense model, the median; of the pruned one, that divided by the ratio."
)
"""What the figures of a comparison are."""


def speed_says(speedup: float, interval: Sequence[float] | None = None) -> str:
    """A ratio of times in words.

    Parameters
    ----------
    speedup : float
        Time of the dense model over that of this one, in the same round: the median of the rounds.
    interval : two floats, optional
        The ratio's, 95%. Where 1 is in it, neither is said to be faster.

    Examples
    --------
    >>> speed_says(1.24, (1.2, 1.29)), speed_says(0.5)
    ('1.24x faster (1.20 to 1.29)', '2.00x slower')
    >>> speed_says(0.98, (0.9, 1.1))
    'as fast within the noise, 0.98x (0.90 to 1.10)'
    """
    low, high = interval or (speedup, speedup)
    if speedup >= 1:
        said = f"{speedup:.2f}x"
        between = f" ({low:.2f} to {high:.2f})"
    else:
        said = f"{1 / speedup:.2f}x"
        between = f" ({1 / high:.2f} to {1 / low:.2f})"
    if interval and low <= 1 <= high:
        return f"as fast within the noise, {speedup:.2f}x ({low:.2f} to {high:.2f})"
    if said == "1.00x":
        return "as fast"
    return f"{said} {'faster' if speedup > 1 else 'slower'}{between if interval else ''}"
