"""How to learn from several source domains: small classes, by name, to which a user can add.

An algorithm turns the losses of one batch, whose images come from every source domain, into the
value that is minimised. It sees the batch of all processes, so that none needs to know of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, ClassVar

import torch
from timm.data import Mixup as TimmMixup
from torch import Tensor, nn

from depgraph import DepgraphError
from domains.recipe import FinetuneSettings


@dataclass(frozen=True)
class Task:
    """What an algorithm is made for.

    Attributes
    ----------
    num_classes, num_domains : int
        Domains are the sources.
    steps_per_epoch, batch_size : int
        Updates of an epoch; images of one update in this process.
    mixup, cutmix, smoothing : float
        As in `FinetuneSettings`.
    """

    num_classes: int
    num_domains: int
    steps_per_epoch: int
    batch_size: int
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0


@dataclass(frozen=True)
class Step:
    """One batch after its forward, over all processes.

    Attributes
    ----------
    losses : Tensor (batch,)
        Cross-entropy of each image.
    domains : Tensor (batch,)
        Which source each image is from, counted from 0.
    features : Tensor (batch, width) or None
        What the classifier reads, for algorithms with `needs_features`.
    """

    losses: Tensor
    domains: Tensor
    features: Tensor | None = None


class ERM(nn.Module):
    """The mean loss over all images (empirical risk minimisation); what the others build on.

    Parameters
    ----------
    task : Task

    Attributes
    ----------
    name : str
        How it is called on the command line.
    needs_features, needs_domains : bool
        Whether `loss` reads the features; whether it has to know each image's domain, which images
        that are mixtures do not have.
    averages : bool
        Whether `averaged` gives the weights that are validated and returned.

    Notes
    -----
    It is an `nn.Module`: what lasts from step to step is a buffer (or a parameter, which is then
    learnt with the model's), and goes into the checkpoint. Keyword arguments of the constructor
    are what ``--algorithm-arg`` sets.

    References
    ----------
    Vapnik, "Statistical Learning Theory", 1998. Gulrajani and Lopez-Paz, "In Search of Lost Domain
    Generalization", ICLR 2021: with care, hard to beat.
    """

    name: ClassVar[str] = "erm"
    needs_features: ClassVar[bool] = False
    needs_domains: ClassVar[bool] = False
    averages: ClassVar[bool] = False

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self._mixup = _make_mixup(task)

    def prepare(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets to train on: labels (batch,), or shares (batch, classes)."""
        return (images, labels) if self._mixup is None else self._mixup(images, labels)

    def loss(self, step: Step) -> Tensor:
        """The value to minimise, a scalar."""
        return step.losses.mean()

    def after_step(self, model: nn.Module, validation_loss: Callable[[], float]) -> None:
        """Called after every update; `validation_loss` of the model as it is costs a pass.

        Launched with FSDP, the model's tensors are `torch.distributed.tensor.DTensor`.
        """

    def averaged(self) -> dict[str, Tensor] | None:
        """The model's state to validate and return, or None: as it is."""
        return None

    @property
    def finished(self) -> bool:
        """Whether further epochs would add nothing."""
        return False


ALGORITHMS: dict[str, type[ERM]] = {}
"""Algorithm classes by name; `register` adds to it."""


def register(cls: type[ERM]) -> type[ERM]:
    """Class decorator that makes an algorithm known by its name.

    Examples
    --------
    >>> @register
    ... class Worst(ERM):
    ...     name, needs_domains = "worst", True
    ...     def loss(self, step):
    ...         return domain_means(step, self.task.num_domains).max()
    >>> _ = ALGORITHMS.pop("worst")
    """
    ALGORITHMS[cls.name] = cls
    return cls


def domain_means(step: Step, num_domains: int) -> Tensor:
    """Mean loss of each source domain, shape (num_domains,); 0 where the batch has none of it."""
    picks = nn.functional.one_hot(step.domains, num_domains).to(step.losses.dtype)
    return step.losses @ picks / picks.sum(0).clamp_min(1)


register(ERM)


@register
class CORAL(ERM):
    """Features of all sources alike in mean and covariance.

    Parameters
    ----------
    penalty : float
        Weight of the mean squared differences, over all pairs of domains; 1 as in DomainBed.

    References
    ----------
    Sun and Saenko, "Deep CORAL: Correlation Alignment for Deep Domain Adaptation", 2016 (eq. 1,
    covariances); with the means and between sources as Gulrajani and Lopez-Paz use it.
    """

    name = "coral"
    needs_features = True
    needs_domains = True

    def __init__(self, task: Task, *, penalty: float = 1.0) -> None:
        super().__init__(task)
        self.penalty = penalty

    def loss(self, step: Step) -> Tensor:
        """Mean loss and penalty."""
        assert step.features is not None
        features = step.features.float()
        parts = [features[step.domains == d] for d in range(self.task.num_domains)]
        known = [_moments(part) for part in parts if len(part) > 1]
        differences = [
            (mean - other_mean).square().mean() + (cov - other_cov).square().mean()
            for (mean, cov), (other_mean, other_cov) in combinations(known, 2)
        ]
        if not differences:
            return super().loss(step)
        return super().loss(step) + self.penalty * torch.stack(differences).mean()


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.mT @ centred / (len(features) - 1)


@register
class Mixup(ERM):
    """Images and labels mixed in pairs; pairs come from any two domains.

    Parameters
    ----------
    alpha : float
        Of the beta distribution; 0.2 as in DomainBed. `FinetuneSettings.mixup` wins where set.

    References
    ----------
    Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018. Between domains: Xu et
    al., "Adversarial Domain Adaptation with Domain Mixup", AAAI 2020.
    """

    name = "mixup"

    def __init__(self, task: Task, *, alpha: float = 0.2) -> None:
        super().__init__(replace(task, mixup=task.mixup or alpha))


@register
class GroupDRO(ERM):
    """The sources weighed by how badly they do: the worst counts most.

    Parameters
    ----------
    step_size : float
        Of the weights' exponentiated gradient ascent; 0.01 as in DomainBed.

    References
    ----------
    Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020
    (algorithm 1).
    """

    name = "groupdro"
    needs_domains = True
    weights: Tensor

    def __init__(self, task: Task, *, step_size: float = 0.01) -> None:
        super().__init__(task)
        self.step_size = step_size
        self.register_buffer("weights", torch.full((task.num_domains,), 1 / task.num_domains))

    def loss(self, step: Step) -> Tensor:
        """The weighed sum of the sources' mean losses."""
        means = domain_means(step, self.task.num_domains).float()
        raised = self.weights * (self.step_size * means.detach()).exp()
        self.weights = raised / raised.sum()
        return self.weights @ means


def make_algorithm(settings: FinetuneSettings, task: Task) -> ERM:
    """The algorithm that `settings` name.

    Raises
    ------
    DepgraphError
        An unknown name (near ones are offered) or argument, or mixed images for an algorithm that
        needs each image's domain.
    """
    name = settings.algorithm
    check_algorithm(name)
    cls: Any = ALGORITHMS[name]
    if cls.needs_domains and (task.mixup or task.cutmix):
        raise DepgraphError(
            f"algorithm '{name}' has to know each image's domain, and mixup and cutmix mix them; "
            "set both to 0"
        )
    try:
        return cls(task, **settings.algorithm_args)
    except TypeError as error:
        said = ", ".join(settings.algorithm_args) or "none"
        raise DepgraphError(
            f"algorithm '{name}' does not take these arguments ({said}): {error}"
        ) from error


def check_algorithm(name: str) -> None:
    """Raise for a name that is not in `ALGORITHMS`."""
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name, ALGORITHMS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise DepgraphError(
            f"unknown algorithm '{name}'; {hint}choose one of {', '.join(ALGORITHMS)}"
        )


def _make_mixup(task: Task) -> TimmMixup | None:
    """timm's mixup or cutmix, or None where both are off."""
    if not (task.mixup or task.cutmix):
        return None
    if task.batch_size % 2:
        raise DepgraphError(
            f"batch_size {task.batch_size} is odd, but mixup and cutmix need pairs; make it even"
        )
    return TimmMixup(
        mixup_alpha=task.mixup,
        cutmix_alpha=task.cutmix,
        label_smoothing=task.smoothing,
        num_classes=task.num_classes,
    )
