"""Writes a module's forward anew from its own trace, at the sizes of a plan, for both modes.

Calls of child modules stay calls, so their mode, hooks and state keep working; sizes that come from
the inputs (batch, tokens) are read from the inputs at run time; every other size is the plan's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from torch import Tensor, nn

from depgraph._modes import is_same_in_both_modes
from depgraph._modules import with_classes
from depgraph._program import (
    Program,
    original_class,
    programmed_class,
    to_program,
)
from depgraph._writer import Source, Writer
from depgraph.axes import Atom
from depgraph.errors import DepgraphError
from depgraph.propagate import Propagation
from depgraph.trace import (
    ModuleCall,
    Trace,
    TraceError,
    trace_forward,
)


class Regenerator:
    """Generates forwards for the modules of one model.

    They are read from the trace of the whole model, and from a second one in the other mode.

    Parameters
    ----------
    outer : Propagation
        Of the whole model.
    kept : mapping of Atom to LongTensor
    model : nn.Module
    classes : mapping of str to type, optional
        Of the modules that had another class than the model's when it was traced.
    writer : type, optional
    """

    def __init__(
        self,
        outer: Propagation,
        kept: Mapping[Atom, Tensor],
        model: nn.Module,
        classes: Mapping[str, type[nn.Module]] | None = None,
        writer: type[Writer] = Writer,
    ) -> None:
        self._outer = outer
        self._kept = kept
        self._model = model
        self._classes = classes or {}
        self._writer = writer
        self._whole: dict[bool, Propagation | None] = {}
        self._names_of: dict[int, list[str]] = {}
        for name, child in model.named_modules(remove_duplicate=False):
            self._names_of.setdefault(id(child), []).append(name)

    def generate(
        self, module: nn.Module, call: ModuleCall, tensors: Mapping[str, str]
    ) -> type[nn.Module]:
        """A class for a module whose forward computes with the sizes of the plan.

        Parameters
        ----------
        module : nn.Module
            Before slicing; not changed.
        call : ModuleCall
            How the model calls it.
        tensors : mapping of str to str
            The model's name of each of the module's parameters and buffers, by local name.

        Returns
        -------
        type
            To assign to ``module.__class__``.

        Raises
        ------
        DepgraphError
            When the forward does what a program cannot say.
        """
        programs: dict[str, Program | None] = {}
        for training, mode in self._modes:
            source = self._source(module, call, tensors, training)
            programs[mode] = (
                None
                if source is None
                else to_program(self._writer(source, self._kept, module).write())
            )
        if "train" in programs and programs["train"] == programs["eval"]:
            del programs["train"]
        return programmed_class(original_class(module), programs)

    @cached_property
    def _modes(self) -> tuple[tuple[bool, str], ...]:
        """The modes to write a program for; the traced one stands for both where they agree."""
        if is_same_in_both_modes(self._outer.trace, with_classes(self._model, self._classes)):
            return ((self._outer.trace.modes[""], "eval"),)
        return ((False, "eval"), (True, "train"))

    def _source(
        self, module: nn.Module, call: ModuleCall, tensors: Mapping[str, str], training: bool
    ) -> Source | None:
        if training not in self._whole:
            self._whole[training] = self._traced_whole(training)
        p = self._whole[training]
        if p is None or call.name not in p.trace.calls_of:
            return None
        children = {
            outer: name
            for name, child in module.named_modules()
            for outer in self._names_of[id(child)]
        }
        names = {p.trace.tensors[name]: key for key, name in tensors.items()}
        return Source(p, p.trace.calls_of[call.name][0], names, children)

    def _traced_whole(self, training: bool) -> Propagation | None:
        """The whole model in one mode; None where it does not run in that mode."""
        if all(mode == training for mode in self._outer.trace.modes.values()):
            return self._outer
        copy = with_classes(self._model, self._classes)
        try:
            traced = trace_forward(copy.train(training), *self._outer.trace.example)
        except TraceError:
            return None  # a generated forward says so when it is called in that mode
        return self._propagated(traced)

    def _propagated(self, traced: Trace) -> Propagation:
        """A second trace in terms of the atoms of the first."""
        axes, outer = self._outer.axes, self._outer.trace
        seeds = dict(zip(traced.inputs, map(axes, outer.inputs), strict=True))
        seeds.update((node, axes(outer.tensors[name])) for name, node in traced.tensors.items())
        p = Propagation(traced, seeds)
        p.run(outputs_are_fixed=False)
        if any(atom.frozen or atom.bound for atom in self._kept):
            raise DepgraphError(
                "the forward couples units in training mode that it does not couple in evaluation "
                "mode; trace the model in training mode to make a plan"
            )
        return p
