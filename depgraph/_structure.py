"""A tree of modules as JSON: classes by name, attributes as plain data, tensors by reference.

This is how a pruned model is rebuilt without knowing how it was made: no constructor runs, no code
comes from the file, and classes are taken only from packages that are trusted or already imported.
"""

from __future__ import annotations

import enum
import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from depgraph._trusted import TRUSTED, is_trusted, load_object, qualified_name
from depgraph.errors import DepgraphError
from depgraph.rewrite import original_class

_INTERNAL = frozenset(vars(nn.Module())) | {"depgraph_plans"}
_CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "size": torch.Size,
}


class Encoder:
    """Turns a module tree into plain data and collects its tensors.

    Parameters
    ----------
    weights_elsewhere : bool
        Whether parameters and persistent buffers may lie on the meta device.

    Attributes
    ----------
    parameters, buffers, loose : dict of str to Tensor
        Parameters and persistent buffers; other buffers; tensors held as plain attributes.
    """

    def __init__(self, weights_elsewhere: bool = False) -> None:
        self._weights_elsewhere = weights_elsewhere
        self.persistent: dict[str, Tensor] = {}
        self.transient: dict[str, Tensor] = {}
        self._tensor_names: dict[int, str] = {}
        self._module_names: dict[int, str] = {}
        self._instances: dict[int, int] = {}

    def module(self, module: nn.Module, name: str = "") -> dict[str, Any]:
        """One module and everything below it."""
        if id(module) in self._module_names:
            return {"same": self._module_names[id(module)]}
        self._module_names[id(module)] = name
        cls = original_class(module)
        # torch gives each parametrized module a class of its own, which no other program has
        parametrized = parametrize.is_parametrized(module)
        out: dict[str, Any] = {
            "class": qualified_name(cls.__bases__[0] if parametrized else cls, name),
            "training": module.training,
            "attributes": {
                key: self.value(value, f"{name}.{key}".lstrip("."))
                for key, value in vars(module).items()
                if key not in _INTERNAL
            },
        }
        if parametrized:
            out["parametrized"] = list(module._modules["parametrizations"])  # type: ignore[call-overload]
        if cls is not type(module):
            raise DepgraphError(f"module '{name}' has a rewritten forward, which is not saved yet")
        transient = module._non_persistent_buffers_set
        out["parameters"] = {
            key: self._tensor(value, f"{name}.{key}", True)
            for key, value in module._parameters.items()
        }
        out["buffers"] = {
            key: self._tensor(value, f"{name}.{key}", key not in transient)
            for key, value in module._buffers.items()
        }
        out["modules"] = {
            key: None if child is None else self.module(child, f"{name}.{key}".lstrip("."))
            for key, child in module._modules.items()
        }
        return out

    def _tensor(self, tensor: Tensor | None, name: str, persistent: bool) -> dict[str, Any] | None:
        if tensor is None:
            return None
        name = self._tensor_names.setdefault(id(tensor), name.lstrip("."))
        if tensor.is_meta and not (persistent and self._weights_elsewhere):
            raise DepgraphError(f"'{name}' is on the meta device; a model without weights has none")
        store = self.persistent if persistent else self.transient
        store.setdefault(name, tensor.detach())
        return {"tensor": name, "requires_grad": tensor.requires_grad, "persistent": persistent}

    def value(self, value: Any, where: str) -> Any:
        """An attribute as plain data."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, enum.Enum):
            return {"enum": [qualified_name(type(value), where), value.name]}
        if isinstance(value, Tensor):
            return {"loose": self._tensor(value, where, False)}
        if isinstance(value, dict):
            items = [[self.value(k, where), self.value(v, where)] for k, v in value.items()]
            return {"ordered" if isinstance(value, OrderedDict) else "dict": items}
        for kind, cls in _CONTAINERS.items():
            if type(value) is cls:
                return {kind: [self.value(item, where) for item in value]}
        if isinstance(value, (torch.dtype, torch.device)):
            kind = "dtype" if isinstance(value, torch.dtype) else "device"
            return {kind: str(value).removeprefix("torch.")}
        if isinstance(value, functools.partial):
            parts = [value.func, list(value.args), dict(value.keywords)]
            return {"partial": [self.value(part, where) for part in parts]}
        if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
            return {"object": qualified_name(value, where)}
        if hasattr(value, "__dict__") and is_trusted(type(value)):
            return {"instance": self._instance(value, where)}
        raise DepgraphError(
            f"attribute '{where}' is a {type(value).__name__}, which is no plain data; "
            "remove it, or save model.state_dict() and the plan's JSON instead"
        )

    def _instance(self, value: Any, where: str) -> list[Any]:
        """An object of a trusted package, such as a configuration that many modules share."""
        if id(value) in self._instances:
            return [self._instances[id(value)]]
        number = self._instances.setdefault(id(value), len(self._instances))
        state = {key: self.value(item, f"{where}.{key}") for key, item in vars(value).items()}
        return [number, qualified_name(type(value), where), state]


class Decoder:
    """Rebuilds the module tree that `Encoder` wrote, around the given tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self._parameters: dict[str, nn.Parameter] = {}
        self._modules: dict[str, nn.Module] = {}
        self._instances: dict[int, Any] = {}

    def module(self, data: dict[str, Any], name: str = "") -> nn.Module:
        """One module and everything below it."""
        if "same" in data:
            return self._modules[data["same"]]
        cls = load_object(data["class"])
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise DepgraphError(f"'{data['class']}' is no module class; the structure is damaged")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        self._modules[name] = module
        module.training = data["training"]
        for key, value in data["attributes"].items():
            vars(module)[key] = self.value(value)
        for key, value in data["parameters"].items():
            module._parameters[key] = None if value is None else self._parameter(value)
        for key, value in data["buffers"].items():
            module._buffers[key] = None if value is None else self._tensor(value)
            if value is not None and not value["persistent"]:
                module._non_persistent_buffers_set.add(key)
        for key, child in data["modules"].items():
            built = None if child is None else self.module(child, f"{name}.{key}".lstrip("."))
            module._modules[key] = built
        if "parametrized" in data:
            parametrize._inject_new_class(module)
            for key in data["parametrized"]:
                parametrize._inject_property(module, key)
        return module

    def _tensor(self, data: dict[str, Any]) -> Tensor:
        if data["tensor"] not in self._tensors:
            raise DepgraphError(f"the weights have no '{data['tensor']}'; the files do not match")
        return self._tensors[data["tensor"]]

    def _parameter(self, data: dict[str, Any]) -> nn.Parameter:
        name = data["tensor"]
        if name not in self._parameters:
            self._parameters[name] = nn.Parameter(self._tensor(data), data["requires_grad"])
        return self._parameters[name]

    def value(self, data: Any) -> Any:
        """The attribute that `Encoder.value` wrote down."""
        if not isinstance(data, dict):
            return data
        ((kind, inner),) = data.items()
        if kind in _CONTAINERS:
            return _CONTAINERS[kind](self.value(item) for item in inner)
        if kind in ("dict", "ordered"):
            items = [(self.value(key), self.value(item)) for key, item in inner]
            return OrderedDict(items) if kind == "ordered" else dict(items)
        if kind == "enum":
            return load_object(inner[0])[inner[1]]
        if kind == "loose":
            return self._tensor(inner)
        if kind == "dtype":
            return getattr(torch, inner)
        if kind == "device":
            return torch.device(inner)
        if kind == "instance":
            return self._instance(*inner)
        if kind == "partial":
            function, args, kwargs = map(self.value, inner)
            return functools.partial(function, *args, **kwargs)
        return load_object(inner)

    def _instance(self, number: int, name: str = "", state: dict[str, Any] | None = None) -> Any:
        if state is not None:
            cls: Any = load_object(name)
            if not isinstance(cls, type) or not is_trusted(cls):
                raise DepgraphError(f"'{name}' is no class of {', '.join(TRUSTED)}")
            made: Any = cls.__new__(cls)  # type: ignore[call-overload]
            self._instances[number] = made
            vars(made).update((key, self.value(item)) for key, item in state.items())
        return self._instances[number]
