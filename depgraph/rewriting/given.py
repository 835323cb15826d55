"""What a module is given at one call: in the sizes of the dense model, some of them as symbols.

A module whose forward is written anew is traced from its dense form. So a pruned call is told in
dense sizes first: a dimension is made of what was cut, which has a known size, and of what the
caller chose (samples, tokens, pixels), which becomes a symbol.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from depgraph.coupling.axes import Atom, Axis, Concat, axis_atoms, axis_size
from depgraph.errors import DepgraphError
from depgraph.rewriting.symbols import Symbols
from depgraph.tracing.alike import UnlikeError, plain_key
from depgraph.tracing.calls import Unread
from depgraph.tracing.meta import META
from depgraph.tracing.objects import Opened, objects_in, opened

Path = tuple[Any, ...]
"""Keys that lead to a leaf: the parameter's name first."""


OWN = "self"
"""In place of an argument: attributes of the module that its forward changes."""


class Attribute(str):
    """A name in a path that is an attribute, as no key of a dict can be."""

    __slots__ = ()


@dataclass(frozen=True)
class Symbol:
    """A dimension, or an integer, that the caller chose.

    Attributes
    ----------
    number : int
        Of the symbol.
    dense : int
        Size in the dense model of what is multiplied with it.
    kept : int
        What is left of that.
    """

    number: int
    dense: int = 1
    kept: int = 1


@dataclass(frozen=True)
class Example:
    """Arguments of the dense module, what tensors among them hold, by identity, and its state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    known: dict[int, Tensor]
    own: Opened | None = None


@dataclass
class GivenTensor:
    """A tensor among the arguments, perhaps at several places.

    Attributes
    ----------
    places : list of Path
    dtype : torch.dtype
    sizes : tuple of int
        In the pruned model.
    dims : tuple of int or Symbol
        In the dense model; None where no shape is known, because nothing reads the tensor.
    axes : list of Axis
        In terms of atoms that are new for this call.
    order : tuple of int
        Dimensions by falling stride.
    unread : bool
        Whether nothing reads the tensor.
    value : Tensor or None
        What the forward may ask for: integers and masks, where they are at hand.
    gradients : (bool, bool)
        Whether it needs gradients, and whether it is a leaf.
    """

    places: list[Path]
    dtype: torch.dtype
    sizes: tuple[int, ...]
    dims: tuple[int | Symbol, ...]
    axes: list[Axis]
    order: tuple[int, ...]
    unread: bool = False
    value: Tensor | None = None
    gradients: tuple[bool, bool] = (False, True)


@dataclass
class Given:
    """All that a module is given at a call.

    Attributes
    ----------
    bound : inspect.BoundArguments
        With the values of this call.
    tensors : dict of int to GivenTensor
        By identity.
    numbers : dict of Path to Symbol
        Integers.
    hints : list of int
        What each symbol is at this call.
    atoms : dict of Atom to Atom
        The new atom of each one of the graph's.
    fresh : dict of int to Atom
        By symbol, where it has another size than the graph's atoms.
    """

    bound: inspect.BoundArguments
    tensors: dict[int, GivenTensor] = field(default_factory=dict)
    numbers: dict[Path, Symbol] = field(default_factory=dict)
    hints: list[int] = field(default_factory=list)
    atoms: dict[Atom, Atom] = field(default_factory=dict)
    fresh: dict[int, Atom] = field(default_factory=dict)

    def leaves(self) -> list[tuple[Path, Any]]:
        """All that is no container, with the keys that lead there."""
        return leaves_of(dict(self.bound.arguments))

    def example(self, symbols: Symbols | None = None) -> Example:
        """Arguments of the dense module on the meta device, with symbols where there are some.

        Without symbols, tensors that say how to read the others (masks, integers) are themselves.
        """
        numbers = [size if symbols is None else symbols.new(size) for size in self.hints]

        def size(dim: int | Symbol) -> Any:
            return dim if isinstance(dim, int) else numbers[dim.number] * dim.dense

        made = {
            key: given.value if symbols is None and given.value is not None else _made(given, size)
            for key, given in self.tensors.items()
        }
        known = {id(made[key]): given.value for key, given in self.tensors.items()}
        flat, spec = pytree.tree_flatten(dict(self.bound.arguments))
        paths = [path for path, _ in self.leaves()]
        values: list[Any] = []
        for path, leaf in zip(paths, flat, strict=True):
            if id(leaf) in made:
                values.append(made[id(leaf)])
            elif path in self.numbers:
                values.append(numbers[self.numbers[path].number])
            else:
                values.append(leaf if is_plain(leaf) else copy.deepcopy(leaf))
        bound = copy.copy(self.bound)
        bound.arguments = pytree.tree_unflatten(values, spec)
        held = {key: value for key, value in known.items() if value is not None}
        return Example(bound.args, bound.kwargs, held, bound.arguments.get(OWN))

    @property
    def key(self) -> Any:
        """What tells apart calls that may run different ops; None where that cannot be told."""
        try:
            looks = tuple(self._look(path, leaf) for path, leaf in self.leaves())
            kinds = tuple(x.cls for _, x in objects_in(dict(self.bound.arguments)).values())
            return looks, kinds, tuple(self.hints)
        except UnlikeError:
            return None

    def _look(self, path: Path, leaf: Any) -> Any:
        given = self.tensors.get(id(leaf))
        if given is not None:
            look = (given.dims, given.dtype, given.order, given.unread, given.gradients)
            return path, given.places[0], *look
        return path, self.numbers.get(path) or plain_key(leaf)


def _made(given: GivenTensor, size: Callable[[int | Symbol], Any]) -> Tensor:
    sizes = [size(dim) for dim in given.dims]
    strides: list[Any] = [1] * len(sizes)
    step: Any = 1
    for dim in reversed(given.order):
        strides[dim] = step
        step = step * sizes[dim]
    made = torch.empty_strided(sizes, strides, dtype=given.dtype, device=META)
    needed, leaf = given.gradients
    if not needed:
        return made
    with torch.enable_grad():
        return made.requires_grad_() if leaf else torch.ops.aten.alias(made.requires_grad_())


def leaves_of(arguments: Any) -> list[tuple[Path, Any]]:
    """Leaves of containers with the keys that lead there: names, places, or ``.attribute``."""
    found, _ = pytree.tree_flatten_with_path(arguments)
    return [(tuple(map(key_of, path)), leaf) for path, leaf in found]


def key_of(entry: Any) -> Any:
    """A key of a path, of one that pytree gives."""
    if isinstance(entry, pytree.GetAttrKey):
        return Attribute(entry.name)
    return entry.idx if isinstance(entry, pytree.SequenceKey) else entry.key


def is_plain(leaf: Any) -> bool:
    """Whether a value can be compared and never changes."""
    try:
        plain_key(leaf)
    except UnlikeError:
        return False
    return True


class Reader:
    """Tells what calls of one module are in dense sizes.

    Parameters
    ----------
    where : str
        The module, for people.
    axes : mapping of Path to list of Axis
        Of the tensors that the module was given when the model was traced.
    kept : mapping of Atom to LongTensor
    """

    def __init__(
        self, where: str, axes: Mapping[Path, Sequence[Axis]], kept: Mapping[Atom, Tensor]
    ) -> None:
        self._where = where
        self._axes = dict(axes)
        self._kept = kept
        self._sizes = {atom: units.shape[-1] for atom, units in kept.items()}

    def read(self, bound: inspect.BoundArguments, dense: bool) -> Given:
        """What a call gives.

        Parameters
        ----------
        bound : inspect.BoundArguments
            Tensors of any device.
        dense : bool
            Whether the tensors are of dense sizes already.

        Raises
        ------
        DepgraphError
            For a size that the pruned model cannot have, or an object that is no plain value.
        """
        bound.arguments = opened(dict(bound.arguments))
        given = Given(bound)
        labels: dict[Any, Symbol] = {}
        for path, leaf in given.leaves():
            if isinstance(leaf, Tensor):
                if id(leaf) in given.tensors:
                    given.tensors[id(leaf)].places.append(path)
                else:
                    given.tensors[id(leaf)] = self._fitting(given, labels, path, leaf, dense)
            elif isinstance(leaf, Unread):
                shape = leaf.shape
                given.tensors[id(leaf)] = GivenTensor(
                    [path], leaf.dtype, shape, shape, [], tuple(range(len(shape))), unread=True
                )
            elif type(leaf) is int and leaf > 1:
                given.numbers[path] = _new_symbol(given, leaf)
            elif not dense and not is_plain(leaf):
                raise DepgraphError(
                    f"{self._where} was pruned from a trace without the {type(leaf).__name__} that "
                    f"it is given as '{spelled(path)}'; trace the model with it, and prune again"
                )
        return given

    def _fitting(
        self, given: Given, labels: dict[Any, Symbol], path: Path, leaf: Tensor, dense: bool
    ) -> GivenTensor:
        """The same; what the module itself keeps may be from before it was cut."""
        try:
            return self._tensor(given, labels, path, leaf, dense)
        except DepgraphError:
            if path[0] != OWN:
                raise
        return GivenTensor([path], leaf.dtype, (), (), [], (), unread=True)

    def _tensor(
        self, given: Given, labels: dict[Any, Symbol], path: Path, leaf: Tensor, dense: bool
    ) -> GivenTensor:
        axes = self._axes.get(path)
        known = axes if axes is not None and len(axes) == leaf.dim() else [None] * leaf.dim()
        sizes, dims, new = [], [], []
        for dim, (axis, size) in enumerate(zip(known, leaf.shape, strict=True)):
            made = self._dim(given, labels, (path, dim), axis, int(size), dense)
            sizes.append(made[0])
            dims.append(made[1])
            new.append(made[2])
        strides = leaf.stride() if leaf.layout is torch.strided else ()
        order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
        integers = type(leaf) is Tensor and not (leaf.is_meta or leaf.is_floating_point())
        whole = integers and not any(map(self._is_cut, known))
        return GivenTensor(
            [path],
            leaf.dtype,
            tuple(sizes),
            tuple(dims),
            new,
            tuple(order),
            value=leaf if whole else None,
            gradients=(leaf.requires_grad, leaf.is_leaf),
        )

    def note(self, given: Given, after: Mapping[Path, Sequence[Axis]]) -> None:
        """Remember what a call left in objects, to know it there at a later one."""
        atoms = {new: old for old, new in given.atoms.items()}
        for path, axes in after.items():
            self._axes.setdefault(path, [_renamed(axis, atoms) for axis in axes])

    def _is_cut(self, axis: Axis | None) -> bool:
        return any(atom in self._kept for atom in axis_atoms(axis or ()))

    def _dim(
        self,
        given: Given,
        labels: dict[Any, Symbol],
        place: tuple[Path, int],
        axis: Axis | None,
        size: int,
        dense: bool,
    ) -> tuple[int, int | Symbol, Axis]:
        """Size in the pruned model, size or symbol in the dense one, and axis."""
        factors = axis or ()
        cut = [f for f in factors if any(atom in self._kept for atom in axis_atoms((f,)))]
        whole, left = axis_size(tuple(cut)), axis_size(tuple(cut), self._sizes)
        free = tuple(f for f in factors if f not in cut)
        chosen = self._chosen(place, axis_size(free), size, whole if dense else left)
        fixed = any(atom.frozen is None for atom in axis_atoms(free))
        same = axis is not None and chosen == axis_size(free)
        if chosen < 2 or fixed or left == 0:
            new = renewed(factors, given) if same else (*_unknown(chosen), *renewed(cut, given))
            return chosen * left, chosen * whole, new
        key = (tuple(map(id, free)), chosen) if axis else place
        symbol = labels.get((key, whole, left))
        if symbol is None:
            known = next((s for (k, _, _), s in labels.items() if k == key), None)
            made = _new_symbol(given, chosen) if known is None else known
            symbol = labels[key, whole, left] = Symbol(made.number, whole, left)
        if same:
            new = renewed(factors, given)
        else:
            new = self._other_size(given, factors, cut, symbol.number, chosen, place)
        return chosen * left, symbol, new

    def _chosen(self, place: tuple[Path, int], traced: int, size: int, fixed: int) -> int:
        """What the caller chose of a size that is a product with a fixed one."""
        if fixed == 0:
            return traced
        chosen, rest = divmod(size, fixed)
        if rest:
            raise DepgraphError(
                f"{self._where} was given '{spelled(place[0])}' with {size} in dimension "
                f"{place[1]}; the pruned model has multiples of {fixed} there"
            )
        return chosen

    def _other_size(
        self,
        given: Given,
        factors: Axis,
        cut: list[Any],
        number: int,
        chosen: int,
        place: tuple[Path, int],
    ) -> Axis:
        """An axis whose factors that were not cut are, together, of another size than traced."""
        where = [i for i, factor in enumerate(factors) if factor not in cut]
        if where and where[-1] - where[0] != len(where) - 1:
            raise DepgraphError(
                f"{self._where} was given '{spelled(place[0])}' with another size in dimension "
                f"{place[1]} than the model was traced with, which cannot be told from the sizes "
                "of the plan in it; trace the model at this size, and prune again"
            )
        first = where[0] if where else 0
        before = [f for f in factors[:first] if f in cut]
        after = [f for f in factors[first:] if f in cut]
        atom = given.fresh.setdefault(number, _frozen(chosen))
        return (*renewed(before, given), atom, *renewed(after, given))


def _new_symbol(given: Given, value: int) -> Symbol:
    given.hints.append(value)
    return Symbol(len(given.hints) - 1)


def _frozen(size: int) -> Atom:
    return Atom(size, "a size of the inputs")


def _unknown(size: int) -> Axis:
    return (_frozen(size),) if size > 1 else ()


def renewed(axis: Sequence[Any], given: Given) -> Axis:
    """An axis in terms of atoms of this call."""
    return tuple(_renewed_factor(factor, given) for factor in axis)


def _renewed_factor(factor: Any, given: Given) -> Any:
    if isinstance(factor, Concat):
        return Concat(tuple(renewed(part, given) for part in factor.parts))
    return given.atoms.setdefault(factor, Atom(factor.size, factor.frozen))


def _renamed(axis: Sequence[Any], atoms: Mapping[Atom, Atom]) -> Axis:
    return tuple(
        Concat(tuple(_renamed(part, atoms) for part in factor.parts))
        if isinstance(factor, Concat)
        else atoms.get(factor, factor)
        for factor in axis
    )


def spelled(path: Path) -> str:
    """A path as code."""
    text = str(path[0])
    for key in path[1:]:
        text += f".{key}" if isinstance(key, Attribute) else f"[{key!r}]"
    return text
