"""The architecture: which factory builds the module, and with which arguments; building it, and filling it with weights.

A manifest chooses among code that the reader's own settings trust; it can never bring code. Modules are built from
trusted factories only.
"""

import importlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import partial
from itertools import chain
from pathlib import PurePath
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from emaswap.errors import BadVersion, EmaswapError, Reason, Short, describe, is_interrupt
from emaswap.files import memory
from emaswap.tensors import differences, dtype_name, in_words, named_tensors, plain_name
from emaswap.versions.bounded import Bounded

TRUSTED_BY_DEFAULT = ("emaswap.models.*",)


_MAX_DEPTH = 32
# What a factory may allocate in all beside what its module is to hold: temporary tensors, buffers that are no state.
_USUAL_FACTOR, _USUAL_BYTES = 4, 64 << 20


def _plain(arguments: object) -> object:
    """Return arguments as JSON has them. Raises `ValueError` for one that JSON cannot hold without a loss."""
    return _plain_value(arguments, "arguments", 0) if isinstance(arguments, Mapping) else arguments


def _plain_value(value: object, name: str, depth: int) -> object:
    if depth > _MAX_DEPTH:
        raise ValueError(f"{name} is nested more than {_MAX_DEPTH} deep")
    value = _unboxed(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        if not _is_storable(value):
            raise ValueError(f"{name} is {value!a}, which JSON cannot hold: give None, or another value")
        return value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return [_plain_value(each, f"{name}[{index}]", depth + 1) for index, each in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {
            key: _plain_value(each, f"{name}[{key!r}]" if depth else f"argument {key!r}", depth + 1)
            for key, each in value.items()
        }
    raise ValueError(f"{name} is a {type(value).__qualname__}, which a manifest cannot hold: {_advice(value)}")


def _unboxed(value: object) -> object:
    """Return the plain value of a number of NumPy or torch, of a path, or of an enum's member."""
    if isinstance(value, Enum) and isinstance(value, (str, int)):
        return value.value
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.dim() == 0):
        return value.item()
    return str(value) if isinstance(value, PurePath) else value


def _is_storable(value: bool | float | str | None) -> bool:  # noqa: FBT001
    if isinstance(value, float):
        return math.isfinite(value)
    # A lone surrogate has no bytes in UTF-8.
    return not isinstance(value, str) or value.encode(errors="ignore").decode() == value


def _advice(value: object) -> str:
    """Return what to write instead of an argument that JSON cannot hold."""
    if isinstance(value, torch.dtype):
        return f"give its name, {dtype_name(value)!r}, and let the factory look it up: getattr(torch, name)"
    if isinstance(value, torch.device):
        return "leave it out; a service chooses its own device"
    if isinstance(value, (Tensor, np.ndarray)):
        return "give a list, by .tolist(), or register it as a buffer, so that it travels with the weights"
    if isinstance(value, Mapping):
        return "its keys must be strings"
    if isinstance(value, (set, frozenset)):
        return "give a sorted list"
    return (
        "give its fields as plain values to a function of yours that makes it again, "
        "such as def build(**fields): return Net(Config(**fields))"
    )


class Architecture(BaseModel):
    """How to build the module: the import path of a factory ("package.module:name"), and its keyword arguments.

    Arguments are plain values. NumPy numbers become plain numbers, paths become strings, tuples become lists.
    """

    # Fields that a later release adds are no reason to refuse a version.
    model_config = ConfigDict(frozen=True, extra="ignore")

    factory: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$", max_length=500)]
    arguments: Annotated[dict[str, JsonValue], BeforeValidator(_plain)] = {}

    @classmethod
    def of(cls, factory: Any, /, *unnamed: object, **arguments: object) -> "Architecture":
        """Return the architecture of a class or function: `Architecture.of(Net, width=32)`.

        Raises `EmaswapError` when a service could not import it, or an argument has no name or is no plain value.
        """
        if unnamed:
            raise EmaswapError(
                f"give every argument of {_shown(factory)} by its name, as in Architecture.of(Net, width=32)"
            )
        try:
            plain = _plain(arguments)
        except ValueError as error:
            raise EmaswapError(f"{_shown(factory)}: {error}") from None
        return cls.model_validate({"factory": _import_path(factory), "arguments": plain})


def to_architecture(given: Architecture | str) -> Architecture:
    """Return an architecture as itself, or the one of an import path. Raises `EmaswapError` for anything else."""
    if isinstance(given, Architecture):
        return given
    try:
        return Architecture(factory=given)
    except ValidationError:
        raise EmaswapError(
            f"expected an architecture, such as Architecture.of(Net, width=32) or 'package.module:Net', got {given!r}"
        ) from None


def _import_path(factory: object) -> str:
    """Return where a class or function can be imported from. Raises `EmaswapError` when it cannot."""
    module, name = getattr(factory, "__module__", None), getattr(factory, "__qualname__", None)
    if isinstance(factory, nn.Module):
        name = type(factory).__name__
        raise EmaswapError(
            f"expected a class or function, got an instance: write Architecture.of({name}, ...) "
            "with the arguments that it was made with"
        )
    if isinstance(factory, str):
        raise EmaswapError(
            f"expected a class or function, got a string: write Architecture(factory={factory!r}, arguments=...)"
        )
    if not callable(factory) or not isinstance(module, str) or not isinstance(name, str):
        raise EmaswapError(
            f"expected a class or function, got {_shown(factory)}: "
            "write Architecture.of(Net, width=32) with the class and its arguments"
        )
    if not name.isidentifier():
        raise EmaswapError(
            f"no service can import {module}:{name}: move it to the top of a module, under a name of its own"
        )
    found = getattr(sys.modules.get(module), name, None)
    if found is not factory:
        raise EmaswapError(
            f"no service can import {module}:{name}: there that name refers to {_shown(found)}; "
            "give it a name of its own at the top of its module"
        )
    return f"{module}:{name}"


def _shown(factory: object) -> str:
    name = getattr(factory, "__qualname__", None)
    return str(name) if isinstance(name, str) else f"something of type {type(factory).__name__}"


def is_trusted(factory: str, trusted: Iterable[str]) -> bool:
    """Return whether a factory is on the list: as itself ("package.module:name"), or in a package or below it ("package.*")."""
    module = factory.partition(":")[0]
    return any(
        factory == pattern or (pattern.endswith(".*") and f"{module}.".startswith(pattern.removesuffix("*")))
        for pattern in trusted
    )


def build(
    architecture: Architecture,
    *,
    trusted: Iterable[str] = TRUSTED_BY_DEFAULT,
    like: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Return a new module in eval mode, with the weights that its factory gave it, or none yet if it is to hold others.

    A factory that allocates much more than the tensors that it is to hold (`like`) is first run on the meta device, which
    has no memory, and refused there if its tensors are others. All others are run once.

    Raises `BadVersion` when the factory is not trusted, cannot be imported, does not return a module, or one with other
    tensors; `Short` when there is no memory for what it makes.
    """
    trusted = list(trusted)
    if not is_trusted(architecture.factory, trusted):
        raise BadVersion(
            Reason.UNTRUSTED_FACTORY,
            f"{architecture.factory} is not among the trusted factories ({', '.join(trusted)}); "
            f"if it should be, start the service with --trust {architecture.factory}",
        )
    module_name, _, name = architecture.factory.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), name)
        if architecture.factory not in trusted and getattr(factory, "__module__", None) != module_name:
            # Trusting a package is trusting what it defines, not all that it happens to import.
            raise BadVersion(
                Reason.UNTRUSTED_FACTORY, f"{architecture.factory} is imported from elsewhere into a trusted package"
            )
        module = _made(partial(factory, **architecture.arguments), like)
        if not isinstance(module, nn.Module):
            raise TypeError(f"it returned a {type(module).__name__}, not a torch.nn.Module")
        if lazy := [name for name, tensor in module.state_dict(keep_vars=True).items() if is_lazy(tensor)]:
            raise TypeError(
                f"{', '.join(lazy[:5])} have no shape before the module has run: "
                "give the sizes instead of a lazy module, or run it once in the factory"
            )
    except (BadVersion, Short):
        raise
    except BaseException as error:  # a factory is somebody else's code and may raise anything
        if is_interrupt(error):
            raise
        raise BadVersion(Reason.FACTORY_FAILED, f"{architecture.factory} failed: {describe(error)}") from error
    return module.eval().requires_grad_(False)


def _called(factory: Callable[[], Any]) -> Any:
    """Return what a factory makes. What it says of versions is none of its business."""
    try:
        return factory()
    except BadVersion as error:
        raise RuntimeError(describe(error)) from None


def _made(factory: Callable[[], Any], like: Mapping[str, Tensor] | None) -> Any:
    if like is None:
        with Bounded():
            return factory()
    factory = partial(_called, factory)
    expected = sum(tensor.numel() * tensor.element_size() for tensor in like.values())
    for to_be_filled in (True, False):
        bounded = Bounded(_USUAL_FACTOR * expected + _USUAL_BYTES, to_be_filled=to_be_filled)
        try:
            with bounded:
                made = factory()
            break
        except Exception:
            if bounded.exceeded:
                break
            if not to_be_filled:  # a factory may look at the weights that it has drawn
                raise
    if not bounded.exceeded:
        return made
    with torch.device("meta"):
        made = factory()
    if isinstance(made, nn.Module):
        _check_fits(made, like)
    with Bounded():
        return factory()


def fill(module: nn.Module, tensors: Mapping[str, Tensor], *, adopt: bool = False) -> None:
    """Copy tensors into a module's parameters and persistent buffers.

    Half precision is widened to the module's own dtype. A module in half precision is widened itself when it is given
    wider tensors, and computes in their dtype from then on.

    With `adopt`, the module uses the memory of the tensors themselves where they need no conversion and nothing else
    looks at the memory that it has; give it tensors on the CPU that nobody writes to.

    Raises `BadVersion` naming every tensor that is missing, unexpected, or of another shape or dtype.
    """
    own = _check_fits(module, tensors)
    adopted: set[str] = set()
    if adopt:
        own.clear()  # which look at the module's memory, too
        adopted = _adopt(module, tensors)
        # What the factory had made is free now, and as large as the weights.
        memory.give_back()
        own = named_tensors(module)
    with torch.no_grad():
        for name in tensors.keys() - adopted:
            own[name].copy_(tensors[name])


def _adopt(module: nn.Module, tensors: Mapping[str, Tensor]) -> set[str]:
    """Let the module use the tensors' memory instead of its own where it can. Return their names."""
    members = set(map(id, chain(module.parameters(), module.buffers())))
    adopted = set()
    for name, own in module.state_dict(keep_vars=True).items():
        given = tensors.get(plain_name(name))
        if given is None or id(own) not in members or own.dtype != given.dtype or own.device.type != "cpu":
            continue
        # Its strides would become the given ones, and with them the kernels that run.
        if own.is_contiguous() and given.is_contiguous() and _is_alone(own):
            own.data = given
            adopted.add(plain_name(name))
    return adopted


def _is_alone(tensor: Tensor) -> bool:
    """Return whether no other tensor looks at a tensor's memory, as far as torch can tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    # By the tensor itself, and by the storage that is asked.
    return count is not None and count(tensor.untyped_storage()._cdata) == _TENSOR_AND_STORAGE


def _check_fits(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the module's own tensors, widened where the given ones are wider. Raises `BadVersion` as `fill` does."""
    try:
        own = named_tensors(module)
    except EmaswapError as error:
        raise BadVersion(Reason.FACTORY_FAILED, str(error)) from None
    common = own.keys() & tensors.keys()
    if wider := [tensors[name].dtype for name in common if own[name].dtype in _NARROW and tensors[name].dtype in _WIDE]:
        widen(module, max(wider, key=lambda dtype: dtype.itemsize))
        own = named_tensors(module)
    if found := differences(own, tensors, dtypes=_holds):
        detail = in_words(found)
        raise BadVersion(Reason(next(iter(found))), detail)
    return own


def widen(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert whatever is in half precision in a module to this dtype."""
    module._apply(lambda tensor: tensor.to(dtype) if tensor.dtype in _NARROW else tensor)  # type: ignore[no-untyped-call]


def _holds(own: torch.dtype, given: torch.dtype) -> bool:
    """Return whether a tensor can be copied without losing anything that was published."""
    return own == given or (own in _WIDE and given in _NARROW)


_TENSOR_AND_STORAGE = 2
_WIDE, _NARROW = (torch.float32, torch.float64), (torch.float16, torch.bfloat16)
