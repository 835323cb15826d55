"""Data by domain, leave-one-domain-out fine-tuning and its measures: the protocol of DomainBed.

The one thing to know: the target domain of a `Split` is read by `evaluate` alone.
"""

from domains.data.checking import DataReport, check_data, evenly
from domains.data.digits import write_digits
from domains.data.folders import DomainData, Sample, load_domains
from domains.data.images import image_size
from domains.data.known import KNOWN, KnownData
from domains.data.split import Split, leave_one_out
from domains.data.unpack import DEFAULT_LIMIT, Unpacked, unpack
from domains.measuring import timing
from domains.measuring.evaluation import Batches, batches, evaluate, folder_batches
from domains.recipe import RECIPES, RECOVERY, FinetuneSettings, Recipe, default_recipe, scale_lr
from domains.running import processes
from domains.running.progress import progress_bar
from domains.training.algorithms import ALGORITHMS, ERM, Step, Task, check_algorithm, register
from domains.training.digits_recipe import (
    DIGITS_MODELS,
    DIGITS_RECIPE,
    DIGITS_RECOVERY,
    DemoModel,
    digits_model,
)
from domains.training.epoch import Hooks
from domains.training.finetuning import FinetuneResult, finetune
from domains.training.state import EpochRow
from domains.training.swad import SWAD

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
