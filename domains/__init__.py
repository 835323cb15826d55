"""Data by domain, leave-one-domain-out fine-tuning and its measures: the protocol of DomainBed.

The one thing to know: the target domain of a `Split` is read by `evaluate` alone.
"""

from domains import processes, timing
from domains._epoch import Hooks
from domains._images import image_size
from domains._progress import progress_bar
from domains._state import EpochRow
from domains.algorithms import ALGORITHMS, ERM, Step, Task, check_algorithm, register
from domains.checking import DataReport, check_data, evenly
from domains.digits import write_digits
from domains.digits_recipe import (
    DIGITS_MODELS,
    DIGITS_RECIPE,
    DIGITS_RECOVERY,
    DemoModel,
    digits_model,
)
from domains.evaluation import Batches, batches, evaluate, folder_batches
from domains.folders import DomainData, Sample, load_domains
from domains.known import KNOWN, KnownData
from domains.recipe import RECIPES, RECOVERY, FinetuneSettings, Recipe, default_recipe, scale_lr
from domains.split import Split, leave_one_out
from domains.swad import SWAD
from domains.training import FinetuneResult, finetune
from domains.unpack import DEFAULT_LIMIT, Unpacked, unpack

__all__ = [
    "ALGORITHMS",
    "DEFAULT_LIMIT",
    "DIGITS_MODELS",
    "DIGITS_RECIPE",
    "DIGITS_RECOVERY",
    "ERM",
    "KNOWN",
    "RECIPES",
    "RECOVERY",
    "SWAD",
    "Batches",
    "DataReport",
    "DemoModel",
    "DomainData",
    "EpochRow",
    "FinetuneResult",
    "FinetuneSettings",
    "Hooks",
    "KnownData",
    "Recipe",
    "Sample",
    "Split",
    "Step",
    "Task",
    "Unpacked",
    "batches",
    "check_algorithm",
    "check_data",
    "default_recipe",
    "digits_model",
    "evaluate",
    "evenly",
    "finetune",
    "folder_batches",
    "image_size",
    "leave_one_out",
    "load_domains",
    "processes",
    "progress_bar",
    "register",
    "scale_lr",
    "timing",
    "unpack",
    "write_digits",
]
