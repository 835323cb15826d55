"""Scores units, chooses what stays under a ratio or a budget, and prunes."""

from pruners import schedules
from pruners._units import reduce_others, sum_over_members
from pruners.activation import FLAP, Variance, Wanda
from pruners.allocation import allocate
from pruners.calibration import measured_latency
from pruners.domain_aware import COMBINATIONS, DomainAware
from pruners.fisher import Fisher, GaussNewton, Hessian, Taylor2
from pruners.geometric_median import FPGM
from pruners.gradient import Taylor
from pruners.hutchinson import Hutchinson
from pruners.latency import LatencyModel
from pruners.magnitude import L1, L2, Lamp, Random
from pruners.metrics import METRICS, Metric, make_metric, register
from pruners.norm_scale import NormScale
from pruners.obs import OBS, OBSFeatures
from pruners.presets import PRESETS
from pruners.pruning import PlannedCut, plan_cut, prune
from pruners.scoring import samples_wanted, score
from pruners.sharded import prune_checkpoint
from pruners.table import LatencyTable

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
