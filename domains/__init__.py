"""Data by domain, leave-one-domain-out fine-tuning and its measures: the protocol of DomainBed.

The one thing to know: the target domain of a `Split` is read by `evaluate` alone.
"""

from domains import timing
from domains._epoch import EpochRow
from domains._images import image_size
from domains._progress import progress_bar
from domains.checking import DataReport, check_data, evenly
from domains.digits import write_digits
from domains.digits_recipe import (
    DIGITS_MODELS,
    DIGITS_RECIPE,
    DIGITS_RECOVERY,
    DemoModel,
    digits_model,
)
from domains.evaluation import Batches, batches, evaluate
from domains.folders import DomainData, Sample, load_domains
from domains.known import KNOWN, KnownData
from domains.recipe import RECIPES, RECOVERY, FinetuneSettings, Recipe, default_recipe, scale_lr
from domains.split import Split, leave_one_out
from domains.training import FinetuneResult, finetune
from domains.unpack import DEFAULT_LIMIT, Unpacked, unpack

__all__ = [
    "DEFAULT_LIMIT",
    "DIGITS_MODELS",
    "DIGITS_RECIPE",
    "DIGITS_RECOVERY",
    "KNOWN",
    "RECIPES",
    "RECOVERY",
    "Batches",
    "DataReport",
    "DemoModel",
    "DomainData",
    "EpochRow",
    "FinetuneResult",
    "FinetuneSettings",
    "KnownData",
    "Recipe",
    "Sample",
    "Split",
    "Unpacked",
    "batches",
    "check_data",
    "default_recipe",
    "digits_model",
    "evaluate",
    "evenly",
    "finetune",
    "image_size",
    "leave_one_out",
    "load_domains",
    "progress_bar",
    "scale_lr",
    "timing",
    "unpack",
    "write_digits",
]
