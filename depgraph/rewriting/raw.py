"""Records a forward as its code sees it: sizes may be symbols, and devices stay what they were.

`depgraph.tracing.recorder` records numbers, for the algebra; a forward that is written anew is read
from both, node by node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from depgraph.errors import DepgraphError
from depgraph.rewriting.changes import changes_in
from depgraph.rewriting.given import Path, leaves_of
from depgraph.rewriting.symbolic_shapes import quick_symbolic
from depgraph.rewriting.symbols import Symbols, hint, pin
from depgraph.tracing.blocks import mapped
from depgraph.tracing.calls import plain
from depgraph.tracing.meta import META, creates
from depgraph.tracing.objects import Absent, Opened, closed, own_attributes
from depgraph.tracing.recorder import Recorder


class ModuleRecorder(Recorder):
    """A graph of a module that is to be written anew: hooks of its children stay with these.

    Parameters
    ----------
    answers : mapping
        To what cannot be known, by where it is asked.
    dropped : frozenset of Path
        Parts of the module's output that the model does not read.
    autocast : str or None
        The kind of device on which ops choose their own types, as ``torch.autocast`` has it.
    own : Opened or None
        What attributes hold that the module changes.
    """

    encloses_hooks = True
    looks_up = True

    def __init__(
        self,
        answers: Mapping[Any, bool],
        dropped: frozenset[Path] = frozenset(),
        autocast: str | None = None,
        own: Opened | None = None,
    ) -> None:
        super().__init__(answers)
        self._own = own
        self._dropped = dropped
        self._autocast = autocast
        # an op may be made of others that see tensors of its own, such as a 0 to fill in
        self._fake = FakeTensorMode(allow_non_fake_inputs=True) if autocast else None

    def results(self, output: Any) -> list[Any]:
        """What of an output the model reads."""
        return [leaf for path, leaf in leaves_of(plain(output)) if path not in self._dropped]

    def begin(self, model: nn.Module) -> None:
        """Let the module's own attributes hold what they do at this call."""
        if self._own is not None:
            self._own = pytree.tree_map_only(Tensor, self.input, self._own)
            for name, value in self._own.fields.items():
                if value is Absent:
                    vars(model).pop(name, None)
                else:
                    vars(model)[name] = closed(value)
        self._before = mapped(own_attributes(model), self.traced)
        self._casts = _casts()

    def call(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Record a call of a child, which has a forward of its own."""
        self._refuse_other_casts()
        return super().call(name, module, args, kwargs)

    def _refuse_other_casts(self) -> None:
        """Written ops run in the types of the module's call, children as they ever did.

        Raises
        ------
        DepgraphError
            Where the forward turns autocast on or off.
        """
        if self.current == "" and _casts() != self._casts:
            raise DepgraphError(
                "its forward turns autocast on or off, which it cannot do once it is rewritten; "
                "leave whole what it needs a rewritten forward for, or put what runs under that "
                "autocast into a module of its own"
            )

    def end(self, model: nn.Module) -> None:
        """Note what the module has changed in its own attributes."""
        changed = changes_in(self._before, mapped(own_attributes(model), self.traced))
        if changed is not None:
            self.stored = changed[0], mapped(changed[1], self._in_object)

    def left_behind(self) -> list[fx.Node]:
        """What the module left in objects for a later call, and gave to children with hooks."""
        given = [(call.args, call.kwargs) for call in self.calls if call.depth == 1]
        left = pytree.tree_leaves((self.calls[-1].after, given, self.stored))
        return [leaf for leaf in left if isinstance(leaf, fx.Node)]

    def with_unread(self) -> None:
        """What nobody reads is not written."""

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self._refuse_other_casts()
        cast = self._cast(func, args, kwargs)
        return super()._run(func, args, kwargs) if cast is None else cast

    def _cast(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an op gives under autocast; None where it does not apply."""
        if self._fake is None or creates(func) or func._schema.is_mutable:
            return None
        mode, device = self._fake, torch.device(str(self._autocast))

        def fake(value: Any) -> Any:
            if isinstance(value, Tensor):
                return FakeTensor(mode, value.detach(), device)
            return device if value == META and isinstance(value, torch.device) else value

        result = func(*self._map(args, fake), **self._map_values(kwargs, fake))
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            # kernels lay it out in different ways: what code does about one has to be seen
            result = result.contiguous()
        return mapped(result, _off_fake)


def _casts() -> Any:
    """On which kinds of device ops choose their own types, and which."""
    if not torch._C._is_any_autocast_enabled():
        return None
    kinds = ("cpu", "cuda")
    return [(torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]


class RawRecorder(ModuleRecorder):
    """A graph in the making whose numbers may be symbols.

    Parameters
    ----------
    answers, dropped, autocast, own
        As of `ModuleRecorder`.
    known : mapping of int to Tensor
        What inputs hold, by the identity of what stands for them.
    symbols : Symbols or None
        That sizes are made of.
    """

    can_repeat = False

    def __init__(
        self,
        answers: Mapping[Any, bool],
        dropped: frozenset[Path],
        autocast: str | None,
        own: Opened | None,
        known: Mapping[int, Tensor],
        symbols: Symbols | None = None,
    ) -> None:
        super().__init__(answers, dropped, autocast, own)
        self._known = known
        self._symbols = symbols

    def number(self, value: Any) -> Any:
        """A number for a symbolic one, without a guard: `_note_read` asks for it."""
        return hint(value)

    def node(self, value: Any) -> Any:
        """The node that made a tensor; any other value as it is, the meta device too."""
        return super().node(value) if isinstance(value, Tensor) else value

    def input(self, tensor: Tensor) -> Tensor:
        """Meta tensor that takes the place of an input."""
        value = super().input(tensor)
        if id(tensor) in self._known:
            self.values.know(self.node(value), self._known[id(tensor)])
        return value

    def __sym_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Arithmetic on symbols is no node: an expression says where a size is from."""
        return func(*args, **kwargs)

    def _note_read(self, tensor: Any, answer: Any, where: tuple[str, ...] = ()) -> None:
        super()._note_read(tensor, answer, where)
        found = self.values.of(self.node(tensor)) if isinstance(tensor, Tensor) else None
        for node in found[1] if found is not None else ():
            _pin_all(node)

    def _quick(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        if self._fake is not None or self._symbols is None:
            return None
        return quick_symbolic(func, args, kwargs, self._symbols.require)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self._refuse_other_casts()
        if creates(func):
            kwargs = {**kwargs, "device": META}
        quick = self._quick(func, args, kwargs)
        if quick is not None:
            return quick
        with torch.no_grad():
            cast = self._cast(func, args, kwargs)
            if cast is not None:
                return cast
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:
                if "symbolic" not in str(error):
                    raise
            # a kernel that knows numbers only: right at these sizes, as a guard then says
            return func(*self._map(args, _concrete), **self._map_values(kwargs, _concrete))


def _off_fake(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)


def _pin_all(node: fx.Node) -> None:
    """Guards that the numbers and sizes of a node are those of the example."""
    for value in pytree.tree_leaves((node.args, dict(node.kwargs), node.meta.get("val"))):
        _concrete(value)


def _concrete(value: Any) -> Any:
    """A tensor or number at the sizes of the example, which become guards."""
    if not isinstance(value, Tensor):
        return pin(value)
    if not value.is_meta:
        return value
    size, stride = map(pin, value.shape), map(pin, value.stride())
    return torch.empty_strided(tuple(size), tuple(stride), dtype=value.dtype, device=META)
