"""Scores units, chooses what stays under a ratio or a budget, and prunes."""

from pruners import schedules
from pruners.calibration import measured_latency
from pruners.choosing.allocation import allocate
from pruners.choosing.domain_aware import COMBINATIONS, DomainAware
from pruners.metrics.activation import FLAP, Variance, Wanda
from pruners.metrics.fisher import Fisher, GaussNewton, Hessian, Taylor2
from pruners.metrics.geometric_median import FPGM
from pruners.metrics.hutchinson import Hutchinson
from pruners.metrics.magnitude import L1, L2, Lamp, Random
from pruners.metrics.norm_scale import NormScale
from pruners.metrics.obs import OBS, OBSFeatures
from pruners.metrics.scoring import samples_wanted, score
from pruners.presets import PRESETS
from pruners.pruning import PlannedCut, plan_cut, prune
from pruners.registry import METRICS, Metric, make_metric, register
from pruners.sharded import prune_checkpoint
from pruners.speed.latency import LatencyModel
from pruners.speed.table import LatencyTable
from pruners.statistics.gradient import Taylor
from pruners.statistics.units import reduce_others, sum_over_members

# In the order in which they are listed to people: the control first, then by what they look at.
for _metric in (
    *(Random, L1, L2, Lamp, FPGM, NormScale),
    *(Wanda, FLAP, Variance),
    *(Taylor, Taylor2, Hessian, GaussNewton, Hutchinson, Fisher, OBS, OBSFeatures),
):
    register(_metric)

__all__ = [
    "COMBINATIONS",
    "FLAP",
    "FPGM",
    "L1",
    "L2",
    "METRICS",
    "OBS",
    "PRESETS",
    "DomainAware",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "Hutchinson",
    "Lamp",
    "LatencyModel",
    "LatencyTable",
    "Metric",
    "NormScale",
    "OBSFeatures",
    "PlannedCut",
    "Random",
    "Taylor",
    "Taylor2",
    "Variance",
    "Wanda",
    "allocate",
    "make_metric",
    "measured_latency",
    "plan_cut",
    "prune",
    "prune_checkpoint",
    "reduce_others",
    "register",
    "samples_wanted",
    "schedules",
    "score",
    "sum_over_members",
]
