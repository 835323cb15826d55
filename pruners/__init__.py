"""Scores units, chooses what stays under a ratio or a budget, and prunes."""

from pruners import schedules
from pruners.allocation import allocate
from pruners.gradient import Hessian, Taylor
from pruners.magnitude import L1, L2, Random
from pruners.metrics import METRICS, Metric, make_metric, register
from pruners.obs import OBS
from pruners.pruning import PlannedCut, plan_cut, prune, samples_wanted, score
from pruners.sharded import prune_checkpoint

__all__ = [
    "L1",
    "L2",
    "METRICS",
    "OBS",
    "Hessian",
    "Metric",
    "PlannedCut",
    "Random",
    "Taylor",
    "allocate",
    "make_metric",
    "plan_cut",
    "prune",
    "prune_checkpoint",
    "register",
    "samples_wanted",
    "schedules",
    "score",
]
