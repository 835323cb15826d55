"""Does a sliced model do what the original with its units switched off does, at any call?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import depgraph
from depgraph.tracing.calls import plain
from tests.reference import CannotJudgeError, KeptStatistics, switched_off

T = TypeVar("T")
Inputs = Any
"""A tensor, or a tuple or dict of what a model is called with."""

LIMITS = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.bfloat16: 0.1,
    torch.float16: 0.03,
}
"""Largest difference, relative to the largest result, that rounding alone explains."""

IN_FLOAT32 = 1e-4
"""The same for a float64 network that computes parts in float32."""

RATE = 0.01
"""Learning rate of the step."""

_JUMPS = ("topk", "argsort", "> 0", ".max(", "amax", "max_pool", "float16", "clamp")
"""Where rounding may decide between two results: only types and shapes are compared then."""


@dataclass(frozen=True)
class Finding:
    """Something that does not hold, or is refused.

    Attributes
    ----------
    outcome : str
        ``"wrong"``, ``"crashed"`` or ``"refused"``.
    check : str
        What was tried.
    text : str
    """

    outcome: str
    check: str
    text: str

    def __str__(self) -> str:
        return f"{self.outcome} at {self.check}: {self.text}"


class Agreement:
    """Runs both models and collects where they differ.

    Parameters
    ----------
    model, small : nn.Module
        The original, and what was cut from it; copies are run.
    graph, plan : DependencyGraph, Plan
    source : str
        Code of the model: says what may be expected of its numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        small: nn.Module,
        graph: depgraph.DependencyGraph,
        plan: depgraph.Plan,
        source: str,
    ) -> None:
        self.reference = without_dropout(switched_off(model, plan))
        self.small = without_dropout(small)
        self.graph, self.plan, self.source = graph, plan, source
        self.findings: list[Finding] = []
        self.checks, self.difference, self.dtype = 0, 0.0, torch.float64

    def demand(self, holds: bool, check: str, otherwise: str) -> None:
        """Note what does not hold."""
        if not holds:
            self.findings.append(Finding("wrong", check, otherwise))

    def attempt(self, check: str, call: Callable[[], T]) -> T | None:
        """The result of a call; None, and a finding, where it raises."""
        try:
            return call()
        except depgraph.DepgraphError as error:
            self.findings.append(Finding("refused", check, str(error)))
        except Exception as error:  # noqa: BLE001  whatever it is, the original raised nothing
            text = f"{type(error).__name__}: {error}"
            self.findings.append(Finding("crashed", check, text))
        return None

    def to(self, dtype: torch.dtype) -> None:
        """Convert both; what is run from now on is compared in that type."""
        self.dtype = dtype
        self.reference.to(dtype)
        self.small.to(dtype)

    def train(self, training: bool) -> None:
        """Put both into a mode."""
        self.reference.train(training)
        self.small.train(training)

    @torch.no_grad()
    def run(self, check: str, x: Inputs, rows: int | None = None) -> bool:
        """Compare at an input; False where the original takes no such input.

        Nor does it where it gives other than so many ``rows``: ``view(-1, 12, 4, 4)`` of a larger
        image is that of more images, whose channels are parts of images.
        """
        reference, small = self.reference, self.small
        if reference.training:  # which may change buffers
            reference, small = copy.deepcopy(reference), copy.deepcopy(small)
        _hook_calls(reference), _hook_calls(small)
        expected = self._expected(reference, x)
        if expected is None or (rows is not None and len(expected[0]) != rows):
            return False
        if not self.compare(check, x, expected, self.dtype, small):
            return True
        counts = [_hook_calls(model) for model in (reference, small)]
        text = f"called {counts[1]} times for {counts[0]}"
        self.demand(counts[0] == counts[1], "hooks", text)
        self.demand(not _saw_meta(small), "hooks", "one saw a meta tensor")
        return True

    @torch.no_grad()
    def compare(
        self,
        check: str,
        x: Inputs,
        expected: list[Tensor],
        dtype: torch.dtype,
        small: nn.Module | None = None,
    ) -> bool:
        """Compare the sliced model's result, or that of a copy, with a given one, if it has one."""
        small = small or self.small
        got = self.attempt(check, lambda: flat(called(small, x)))
        if got is not None and self._same_look(check, got, expected):
            difference = largest_difference(got, expected)
            if dtype == self.dtype:
                self.difference = max(self.difference, difference)
            limit = LIMITS[dtype]
            if "float32" in self.source or ".float()" in self.source or check == "computed weights":
                limit = max(limit, IN_FLOAT32)
            self.demand(difference <= limit, check, f"differs by {difference:.1e}")
        return got is not None

    @torch.no_grad()
    def in_type(self, dtype: torch.dtype, x: Inputs) -> None:
        """Compare after a conversion to another type."""
        reference, small = copy.deepcopy(self.reference), self.attempt("a copy", self._copy)
        if small is not None:
            x = converted(x, dtype)
            reference, small = reference.to(dtype).eval(), small.to(dtype).eval()
            self._roughly(str(dtype).removeprefix("torch."), reference, small, x, dtype)

    @torch.no_grad()
    def under_autocast(self, x: Inputs) -> None:
        """Compare in float32 under autocast."""
        reference, small = copy.deepcopy(self.reference), self.attempt("a copy", self._copy)
        if small is not None:
            reference, small = reference.float().eval(), small.float().eval()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                self._roughly(
                    "autocast", reference, small, converted(x, torch.float32), torch.bfloat16
                )

    def copied(self, x: Inputs) -> None:
        """Compare a deep copy, in evaluation."""
        small = self.attempt("a copy", self._copy)
        if small is not None:
            was, self.small = self.small, small
            self.train(False)
            self.run("a copy", x)
            self.small = was

    def step(self, x: Tensor) -> None:
        """Compare loss and gradients of a training step, and both models after it."""
        self.train(True)
        for model in (self.reference, self.small):
            model.zero_grad(set_to_none=True)
        given, ours = (x.clone().requires_grad_(x.is_floating_point()) for _ in range(2))
        loss = self._judged(self.reference, lambda: self._loss(self.reference, given))
        if loss is None:
            return
        got = self.attempt("a step", lambda: self._loss(self.small, ours))
        if got is None:
            return
        self.checks += 1
        self.demand(_near(got, loss), "the loss", f"{got.item():.6g} for {loss.item():.6g}")
        if given.grad is not None:
            same = ours.grad is not None and _near(ours.grad, given.grad)
            self.demand(same, "the input's gradient", "differs")
        direct = self._same_gradients()
        self._update(direct)
        self.train(False)
        self.run("after a step", x)

    def _loss(self, model: nn.Module, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        total = torch.zeros((), dtype=torch.float64)
        for leaf in flat(model(x)):
            total = total + (leaf * torch.randn(leaf.shape, generator=generator)).sum()
        total.backward()
        return total.detach()

    def _same_gradients(self) -> bool:
        """Compare gradients of what is kept; whether all weights are the original's own values."""
        ours = dict(self.small.named_parameters())
        direct = True
        grads = [p.grad for p in self.reference.parameters() if p.grad is not None]
        # a bias before a batch norm has a gradient of rounding alone
        noise = 1e-12 * max((g.abs().max().item() for g in grads if g.numel()), default=0.0)
        for name, theirs in self.reference.named_parameters():
            mine = ours.get(name)
            if mine is None:
                continue
            weight, wanted = (self._kept(name, t) for t in (theirs.detach(), theirs.grad))
            if weight is None or weight.shape != mine.shape:
                continue
            grad = torch.zeros_like(mine) if mine.grad is None else mine.grad
            wanted = torch.zeros_like(mine) if wanted is None else wanted
            if not torch.equal(weight, mine.detach()):  # a factor moved from one to another
                direct = False
                grad, wanted = grad * mine.detach(), wanted * weight
            near = _near(grad, wanted) or bool(((grad - wanted).abs() <= noise).all())
            self.demand(near, "gradients", f"that of {name} differs")
            reached = theirs.grad is not None and bool(theirs.grad.any())
            self.demand(
                reached or mine.grad is None or not bool((mine.grad.abs() > noise).any()),
                "gradients",
                f"{name} has one that the original shuts off",
            )
        return direct

    @torch.no_grad()
    def _update(self, direct: bool) -> None:
        for model in (self.reference, self.small):
            for name, parameter in model.named_parameters():
                if not direct:
                    parameter.mul_(1.1)
                elif parameter.grad is not None:
                    change = parameter.grad.clone()
                    if model is self.reference:
                        change = self._only_kept(name, change)
                    parameter.sub_(change.clamp(-1, 1), alpha=RATE)

    def _kept(self, name: str, tensor: Tensor | None) -> Tensor | None:
        for dim, indices in self.plan.kept.get(name, {}).items():
            tensor = None if tensor is None else tensor.index_select(dim, indices)
        return tensor

    def _only_kept(self, name: str, change: Tensor) -> Tensor:
        for dim, indices in self.plan.kept.get(name, {}).items():
            part = change.index_select(dim, indices)
            change = torch.zeros_like(change).index_copy(dim, indices, part)
        return change

    def _copy(self) -> nn.Module:
        return copy.deepcopy(self.small)

    def _judged(self, model: nn.Module, call: Callable[[], T]) -> T | None:
        try:
            with KeptStatistics(self.graph, self.plan, model):
                return call()
        except (RuntimeError, ValueError, IndexError, TypeError, CannotJudgeError, KeyError):
            return None

    def _expected(self, model: nn.Module, x: Inputs) -> list[Tensor] | None:
        return self._judged(model, lambda: flat(called(model, x)))

    def _roughly(
        self, check: str, reference: nn.Module, small: nn.Module, x: Inputs, dtype: torch.dtype
    ) -> None:
        """Compare two models in a type with as much leeway as the original itself needs."""
        expected = self._expected(reference, x)
        if expected is None:
            return
        got = self.attempt(check, lambda: flat(called(small, x)))
        if got is None or not self._same_look(check, got, expected):
            return
        if any(word in self.source for word in _JUMPS) or not all(
            bool(e.isfinite().all()) for e in expected
        ):
            return
        exact = converted(x, torch.float64)
        without = torch.autocast("cpu", enabled=False) if check == "autocast" else nullcontext()
        with without:
            precise = self._expected(copy.deepcopy(reference).double(), exact)
        if precise is None or [p.shape for p in precise] != [e.shape for e in expected]:
            return
        own = largest_difference(expected, precise)
        difference = largest_difference(got, expected)
        limit = LIMITS[dtype] + 8 * own
        self.demand(difference <= limit, check, f"differs by {difference:.1e}, itself {own:.1e}")

    def _same_look(self, check: str, got: list[Tensor], expected: list[Tensor]) -> bool:
        self.checks += 1
        looks = [[(tuple(t.shape), t.dtype) for t in tensors] for tensors in (got, expected)]
        if looks[0] != looks[1]:
            text = f"gives {_look(looks[0])} for {_look(looks[1])}"
            self.findings.append(Finding("wrong", check, text))
            return False
        return True


def _look(look: list[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{tuple(shape)} {dtype}" for shape, dtype in look) or "nothing"


def converted(x: Inputs, dtype: torch.dtype) -> Inputs:
    """Inputs with their floats in that type."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, x)


def called(model: nn.Module, x: Inputs) -> Any:
    """What a model gives for copies of inputs, with the same random numbers each time."""
    torch.manual_seed(0)
    x = pytree.tree_map_only(Tensor, Tensor.clone, x)
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def flat(output: Any) -> list[Tensor]:
    """The tensors of a result."""
    return [leaf for leaf in pytree.tree_leaves(plain(output)) if isinstance(leaf, Tensor)]


def largest_difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of the differences of several results, each relative to its largest value."""
    return max((_relative(a, b) for a, b in zip(got, expected, strict=True)), default=0.0)


def _relative(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    if not got.numel():
        return 0.0
    if torch.equal(got.isnan(), expected.isnan()):
        got, expected = got.nan_to_num(), expected.nan_to_num()
    difference = (got - expected).abs().max()
    return (difference / expected.abs().max().clamp(min=1e-6)).item() if difference != 0 else 0.0


def _near(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape:
        return False
    return _relative(got, expected) <= 1e-4 or bool(((got - expected).abs() <= 1e-9).all())


def without_dropout(model: nn.Module) -> nn.Module:
    """So that training computes the same twice."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def _hook_calls(model: nn.Module) -> int:
    """How often hooks that count were called since the last time that this was asked."""
    return sum(module.__dict__.pop("calls", 0) for module in model.modules())


def _saw_meta(model: nn.Module) -> bool:
    return any(getattr(module, "metas", False) for module in model.modules())
