"""Settings of a fine-tuning; the defaults suit a pretrained transformer before it is pruned.

`RECIPES` are for after. The augmentation is DomainBed's; the rates were chosen on validation
images of source domains: with AdamW and few epochs, 1e-4 and more costs a pretrained model more
than it teaches, and one whose cut was compensated forgets at 5e-5 what the refit had saved. One
that has lost half of its units, and was not refitted, has to learn again, at a higher rate.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from depgraph import DepgraphError


@dataclass(frozen=True)
class FinetuneSettings:
    """Everything that decides the result of a fine-tuning, beside model, data and teacher.

    Parameters
    ----------
    epochs, batch_size : int
        One epoch draws as many images as the sources have for training, rounded up to whole
        batches. The batch size is over all domains together.
    lr, weight_decay : float
        Peak learning rate; decay of matrices only (timm leaves vectors and what the model names).
    warmup_epochs : float
        Linear warm-up from 1% of `lr`; then `schedule` ends at 1% of `lr`.
    optimizer, schedule : str
        Names that timm knows: adamw, sgd, lamb, ...; cosine, poly, constant, ...
    layer_decay : float
        Factor on `lr` per layer away from the head; 1: the same for all.
    clip_grad : float or None
        Largest gradient norm.
    smoothing, mixup, cutmix : float
        Label smoothing; the alphas of mixup and cutmix (0: off).
    sampling : "equal" or "concat"
        "equal": each batch has as many images of each source domain, as in DomainBed, the images
        of a small domain being drawn more often. "concat": all images of all sources alike.
    ema_decay : float
        Decay of the moving average of the weights that is then validated and returned; 0: none.
        Warmed up, so that a short run is averaged too.
    distill_weight, distill_temperature : float
        With a teacher: share of the distillation loss, and its temperature.
    feature_weight : float
        With a teacher: weight of the squared distance of all tokens before the head, relative to
        the teacher's; beside the other losses, 0: none.
    algorithm : str
        How to learn from several domains, one of `ALGORITHMS`.
    algorithm_args : dict
        Keyword arguments of its class.
    keep : "best" or "last"
        Which epoch's weights are returned: those that did best on the sources' validation parts,
        or the last, for a training whose use shows only later.
    crop_scale, crop_ratio : (float, float)
        Area and aspect ratio of the random crop.
    hflip, color_jitter, grayscale, random_erasing : float
        Probability of the flip, strength of the jitter, probability of grey, of erasing.
    auto_augment : str or None
        A timm policy such as "rand-m7-mstd0.5-inc1" or "augmix-m3"; replaces the colour jitter.
    looks : "none", "calm" or "all"
        Show each image in one of these looks (`domains.data.looks`) at each draw, after crop
        and jitter; a teacher sees the same pixels.
    img_size : int or None
        None: the size the model was built for.
    may_keep_start : bool
        Validate the model as it comes too, and leave it so where no epoch is better.
    seed : int
        Decides order, augmentation, drop-out; each epoch and each image has its own stream, so
        that neither `num_workers` nor a resumed run changes the result.
    device : str or None
        None: CUDA where there is one, else the CPU.
    amp : bool
        Mixed precision: bfloat16, or float16 with loss scaling on GPUs without it.
    num_workers : int or None
        Loader processes; None: none on the CPU, up to 8 beside a GPU.
    cache_mib : float
        Keep the decoded images in memory if all need at most this; else decode at every use.
    """

    epochs: int = 6
    batch_size: int = 32
    lr: float = 3e-5
    weight_decay: float = 0.05
    warmup_epochs: float = 0.5
    optimizer: str = "adamw"
    schedule: str = "cosine"
    layer_decay: float = 1.0
    clip_grad: float | None = 1.0
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    sampling: Literal["equal", "concat"] = "equal"
    ema_decay: float = 0.0
    distill_weight: float = 0.5
    distill_temperature: float = 2.0
    feature_weight: float = 0.0
    algorithm: str = "erm"
    algorithm_args: dict[str, Any] = field(default_factory=dict)
    keep: Literal["best", "last"] = "best"
    crop_scale: tuple[float, float] = (0.7, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.3
    grayscale: float = 0.1
    random_erasing: float = 0.0
    auto_augment: str | None = None
    looks: Literal["none", "calm", "all"] = "none"
    img_size: int | None = None
    may_keep_start: bool = False
    seed: int = 0
    device: str | None = None
    amp: bool = False
    num_workers: int | None = None
    cache_mib: float = 1024.0

    def __post_init__(self) -> None:
        """Refuse values that cannot train."""
        rules: list[tuple[str, bool, str]] = [
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", self.lr > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, "from 0 to below epochs"),
            ("layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1"),
            ("clip_grad", self.clip_grad is None or self.clip_grad > 0, "above 0, or None"),
            ("smoothing", 0 <= self.smoothing < 1, "from 0 to below 1"),
            ("mixup", self.mixup >= 0, "at least 0"),
            ("cutmix", self.cutmix >= 0, "at least 0"),
            ("sampling", self.sampling in ("equal", "concat"), "'equal' or 'concat'"),
            ("ema_decay", 0 <= self.ema_decay < 1, "from 0 to below 1"),
            ("distill_weight", 0 <= self.distill_weight <= 1, "from 0 to 1"),
            ("distill_temperature", self.distill_temperature > 0, "above 0"),
            ("feature_weight", self.feature_weight >= 0, "at least 0"),
            ("looks", self.looks in ("none", "calm", "all"), "'none', 'calm' or 'all'"),
            ("keep", self.keep in ("best", "last"), "'best' or 'last'"),
            ("crop_scale", 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1, "within (0, 1]"),
            ("num_workers", self.num_workers is None or self.num_workers >= 0, "at least 0"),
        ]
        for name, good, allowed in rules:
            if not good:
                raise DepgraphError(f"{name} is {getattr(self, name)!r}; it must be {allowed}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise DepgraphError(
                f"batch_size {self.batch_size} is odd, but mixup and cutmix need pairs; "
                "make it even"
            )


RECOVERY = FinetuneSettings(epochs=4, lr=2e-4)
"""Training of a pretrained timm transformer after a cut that was not compensated."""

GENTLE = FinetuneSettings(epochs=4, lr=6e-6, ema_decay=0.99, may_keep_start=True)
"""Training after a compensated cut; the rate is for a whole model, see `scale_lr`.

The average of the weights over about 100 steps is validated and kept, as in SWAD: averages lie in
flatter minima, which carry over better to domains that were not seen.

References
----------
Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021.
"""


GENTLE_MOST = 5e-5
"""The highest rate that `scale_lr` goes to."""


@dataclass(frozen=True)
class Recipe:
    """A way to train a pruned model.

    Parameters
    ----------
    settings : FinetuneSettings
    by_share : bool
        Whether the rate is divided by the share of the MACs that is left.
    distill : bool
        Whether the dense model is a teacher.
    cost : str
        What it takes, in epochs of the pruned model.
    """

    settings: FinetuneSettings
    by_share: bool
    distill: bool
    cost: str

    def settings_for(self, share: float) -> FinetuneSettings:
        """The settings for a model of which this share of the MACs is left."""
        return scale_lr(self.settings, share) if self.by_share else self.settings


def scale_lr(settings: FinetuneSettings, share: float) -> FinetuneSettings:
    """Settings whose rate suits a model of which this share of the MACs is left.

    The more is gone, the more there is to learn again: the rate grows as the model shrinks, up to
    `GENTLE_MOST`. Chosen on a ViT-S/14: 1e-5 and 2e-5 did equally well with 0.36 of the MACs left,
    5e-5 well and 1e-4 badly with 0.15.
    """
    return replace(settings, lr=min(settings.lr / share, max(GENTLE_MOST, settings.lr)))


LOOKS = FinetuneSettings(
    epochs=4,
    lr=5e-5,
    ema_decay=0.99,
    may_keep_start=True,
    looks="calm",
    feature_weight=0.5,
)
"""Training after a compensated cut that is to keep what generalises: looks, tokens and logits.

Tokens, logits at temperature 2 (times its square) and labels weigh alike.
"""

RECIPES = {
    "gentle": Recipe(GENTLE, True, False, "4 epochs"),
    "distill": Recipe(GENTLE, True, True, "4 epochs, and 4 of forwards of the dense model"),
    "looks": Recipe(LOOKS, False, True, "4 epochs, and 4 of forwards of the dense model"),
    "strong": Recipe(RECOVERY, False, False, "4 epochs"),
}
"""By name; `run` takes "looks" after a compensated cut and "strong" after any other."""


def default_recipe(compensated: bool) -> str:
    """The name of the recipe for a cut of this kind, with the dense model at hand."""
    return "looks" if compensated else "strong"
