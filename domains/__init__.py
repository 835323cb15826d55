"""Data by domain, leave-one-domain-out fine-tuning and its measures: the protocol of DomainBed.

The one thing to know: the target domain of a `Split` is read by `evaluate` alone.
"""

from domains import processes, timing
from domains._epoch import Hooks
from domains._images import image_size
from domains._progress import progress_bar
from domains._state import EpochRow
from domains.algorithms import ALGORITHMS, ERM, Step, Task, check_algorithm, register
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
from domains.recipe import RECIPES, RECOVERY, FinetuneSettings, Recipe, default_recipe, scale_lr
from domains.split import Split, leave_one_out
from domains.swad import SWAD
from domains.training import FinetuneResult, finetune

__all__ = [
    "ALGORITHMS",
    "DIGITS_MODELS",
    "DIGITS_RECIPE",
    "DIGITS_RECOVERY",
    "ERM",
    "RECIPES",
    "RECOVERY",
    "SWAD",
    "Batches",
    "DemoModel",
    "DomainData",
    "EpochRow",
    "FinetuneResult",
    "FinetuneSettings",
    "Hooks",
    "Recipe",
    "Sample",
    "Split",
    "Step",
    "Task",
    "batches",
    "check_algorithm",
    "default_recipe",
    "digits_model",
    "evaluate",
    "finetune",
    "image_size",
    "leave_one_out",
    "load_domains",
    "processes",
    "progress_bar",
    "register",
    "scale_lr",
    "timing",
    "write_digits",
]
