"""A device that is not the CPU, for machines that have no other: tensors that only say so.

``python -m tests.pretend`` scores and prunes every small network with every metric on it, and
prints one JSON object: by case, what went wrong, or null. As on a real device, an op refuses
tensors of two devices (numbers aside) and a generator of another one. In a process of its own,
since torch cannot forget a device.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretend"

aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class Held(Tensor):
    """A tensor that says it is elsewhere."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Held:
        made: Held = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op on what is held."""
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    values = pytree.tree_leaves((args, kwargs))
    tensors = [value for value in values if isinstance(value, Tensor)]
    here = any(isinstance(value, Held) for value in tensors)
    if kwargs.get("device") is not None:
        here = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": "cpu"} if here else kwargs
    elif func is aten.copy_.default:
        here = isinstance(args[0], Held)
    if func not in MOVES:
        _check(func, args, tensors)
    if here and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func} on '{NAME}' was given a generator of the CPU")
    inside, named = pytree.tree_map_only(Held, lambda x: x.held, (args, kwargs))
    result = func(*inside, **named)
    if func._schema.name.endswith("_") and isinstance(args[0], Tensor):
        return args[0]  # in place
    if kwargs.get("out") is not None:
        return kwargs["out"]
    return pytree.tree_map_only(Tensor, Held, result) if here else result


def _check(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Refuse two devices, as CUDA does: numbers may come from the CPU, and indices too."""
    elsewhere = [x for x in tensors if isinstance(x, Held)]
    if func in INDEXING and isinstance(args[0], Held):
        tensors = [x for x in (args[0], *args[2:]) if isinstance(x, Tensor)]
    here = [tuple(x.shape) for x in tensors if not isinstance(x, Held) and x.dim() > 0]
    if elsewhere and here:
        raise RuntimeError(f"{func} has tensors on '{NAME}' and, of shapes {here}, on the CPU")


class _Ops(TorchDispatchMode):
    """Also for ops that make tensors from nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def pretended() -> Iterator[torch.device]:
    """The device; while this lasts, tensors can be made there and models moved there."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    library = torch.library.Library("aten", "IMPL")
    for op in (aten.empty.memory_format, aten.empty_strided.default):
        # what torch's own C++ code makes, out of the mode's sight
        library.impl(op, partial(_made, op), "PrivateUse1")
    library.impl(aten._copy_from.default, _copied, "PrivateUse1")
    with _Ops():
        yield torch.device(NAME, 0)


def _made(op: Any, *args: Any, **kwargs: Any) -> Tensor:
    return Held(op(*args, **{**kwargs, "device": "cpu"}))


def _copied(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    inside = [x.held if isinstance(x, Held) else x for x in (source, target)]
    inside[1].copy_(inside[0])
    return target


def _cases() -> Iterator[tuple[str, Callable[[torch.device], None]]]:
    import pruners
    from tests.pruners.networks import NETWORKS

    for name in NETWORKS:
        for metric in pruners.METRICS if name in SCORED else ():
            yield f"{name}, {metric}", partial(_scores_agree, name, metric)
        for what, options in CUTS.items():
            yield f"{name}, {what}", partial(_stays, name, options)


CUTS: dict[str, dict[str, Any]] = {
    "compensated": {"metric": "obs", "ratio": 0.5},
    "budget": {"metric": "obs", "target": {"macs": 0.6}, "kinds": "auto"},
    "per head": {"metric": "taylor", "ratio": 0.3, "per_head": True, "compensate": False},
    "emptied": {"metric": "l2", "ratio": 0.8, "min_units": 0},
}


SCORED = ("tied", "convolutions", "vit_base_patch16_224")
"""Networks that between them have every kind of member that metrics treat apart."""


def _scores_agree(name: str, metric: str, device: torch.device) -> None:
    import depgraph
    import pruners
    from tests.pruners.networks import batches, network

    found = []
    for where in ("cpu", device):
        model, inputs = network(name)
        inputs = inputs.to(where)
        graph = depgraph.trace(model.to(where), inputs[:2])
        samples = [(x, y.to(where)) for x, y in batches(inputs)]
        scores = pruners.score(model, graph, metric, samples)
        found.append({group: values.detach().cpu() for group, values in scores.items()})
    for group, values in found[0].items():
        torch.testing.assert_close(found[1][group], values, rtol=1e-2, atol=1e-6)


def _stays(name: str, options: dict[str, Any], device: torch.device) -> None:
    import pruners
    from tests.pruners.networks import batches, network

    model, inputs = network(name)
    inputs = inputs.to(device)
    model.to(device)
    samples = [(x, y.to(device)) for x, y in batches(inputs)]
    small, _ = pruners.prune(model, inputs[:2], batches=samples, **options)
    tensors = [*small.parameters(), *small.buffers(), *model.parameters(), *model.buffers()]
    places = {str(tensor.device) for tensor in tensors}
    if places != {str(device)}:
        raise RuntimeError(f"tensors are on {sorted(places)} afterwards")
    small(inputs)


def main() -> None:
    """Try all cases."""
    found: dict[str, str | None] = {}
    with pretended() as device:
        for name, attempt in _cases():
            found[name] = None
            try:
                attempt(device)
            except Exception as error:  # noqa: BLE001  # each is told, none stops the others
                found[name] = f"{type(error).__name__}: {error}"
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
