"""Ratios of times that were taken in the same rounds, with their interval."""

import math

import numpy as np


def paired(times: np.ndarray, column: int) -> tuple[float, float, tuple[float, float]]:
    """What is compared within rounds, so that a slow phase of the machine cancels.

    Parameters
    ----------
    times : ndarray of float, shape (rounds, functions)
        See `in_turns`.
    column : int

    Returns
    -------
    seconds : float
        The first function's median time, divided by the speed-up.
    speedup : float
        Median of (time of the first / time of this one).
    interval : tuple of two floats
        95% confidence interval of that median by its order statistics; the extremes of fewer than
        six rounds, which tell no more.

    References
    ----------
    Conover, Practical Nonparametric Statistics, 3rd ed., 1999, section 3.2.
    """
    ratios = np.sort(times[:, 0] / times[:, column])
    speedup, rounds = float(np.median(ratios)), len(ratios)
    # how many ratios are below their median is binomial: 1.96 of its standard deviations
    low = max(0, math.floor((rounds - 1.96 * rounds**0.5 - 1) / 2))
    interval = float(ratios[low]), float(ratios[rounds - 1 - low])
    return float(np.median(times[:, 0])) / speedup, speedup, interval
