"""Scores units, chooses what stays under a ratio or a budget, and prunes."""

from pruners.allocation import allocate
from pruners.calibration import measured_latency
from pruners.gradient import Hessian, Taylor
from pruners.latency import LatencyModel
from pruners.magnitude import L1, L2, Random
from pruners.metrics import METRICS, Metric, make_metric, register
from pruners.obs import OBS
from pruners.pruning import prune, samples_wanted, score
from pruners.sharded import prune_checkpoint
from pruners.table import LatencyTable

__all__ = [
    "L1",
    "L2",
    "METRICS",
    "OBS",
    "Hessian",
    "LatencyModel",
    "LatencyTable",
    "Metric",
    "Random",
    "Taylor",
    "allocate",
    "make_metric",
    "measured_latency",
    "prune",
    "prune_checkpoint",
    "register",
    "samples_wanted",
    "score",
]
