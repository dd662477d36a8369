"""The tensors of a module's state and their places in it, to tell at next to no cost whether they are still the same."""

from functools import cache
from itertools import chain, repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from emaswap.errors import EmaError
from emaswap.tensors import plain_name

# Stands for a name that is not there any more; one that is there may hold None.
_GONE = object()


class Held:
    """Holds the tensors of a module's state with their places in it.

    Every update compares them, so comparing must cost next to nothing beside an update: it goes through plain
    dictionaries, in loops that the interpreter runs in C.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._children: list[dict[str, Any]] = []
        self._folders: list[dict[str, Any]] = []
        self._not_persistent: list[set[str]] = []
        self._places: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._values: list[Tensor | None] = []
        self._tensors: list[Tensor] = []
        self._names: list[str] = []
        for prefix, child in module.named_modules(remove_duplicate=False):
            self._children.append(child._modules)
            self._folders += (child._parameters, child._buffers)
            self._not_persistent.append(child._non_persistent_buffers_set)
            # Non-persistent buffers are no state.
            for held, skipped in ((child._parameters, ()), (child._buffers, child._non_persistent_buffers_set)):
                for key, tensor in held.items():
                    if key in skipped:
                        continue
                    # Also where there is no tensor yet: one that comes later must be noticed.
                    self._places.append(held)
                    self._keys.append(key)
                    self._values.append(tensor)
                    if tensor is not None:
                        self._tensors.append(tensor)
                        self._names.append(f"{prefix}.{key}" if prefix else key)
        for name, tensor in zip(self._names, self._tensors, strict=True):
            if problem := why_not_averaged(tensor):
                raise EmaError(f"{plain_name(name)} cannot be averaged: {problem}")
        self._persistence = list(map(set, self._not_persistent))
        self._locals = [getattr(tensor, "_local_tensor", tensor) for tensor in self._tensors]
        self._memories = [tensor.detach() for tensor in self._locals]
        self._seen = self._look()

    def state(self) -> dict[str, Tensor]:
        """Return the state by plain names."""
        names = (plain_name(name) for name in self._names)
        return dict(zip(names, self._tensors, strict=True))

    def put_back(self) -> None:
        """Undo every replacement, conversion and move since."""
        for place, key, value in zip(self._places, self._keys, self._values, strict=True):
            place[key] = value
        for tensor, memory in zip(self._tensors, self._memories, strict=True):
            now = local_part(tensor)
            if _place(now) != _place(memory):
                tensor.data = memory

    def is_of(self, module: nn.Module) -> bool:
        """Return whether this is the state of that module, with nothing in it replaced, converted or moved."""
        return (
            module is self._module
            and all(map(is_, map(dict.get, self._places, self._keys, repeat(_GONE)), self._values))
            and self._not_persistent == self._persistence
            and self._look() == self._seen
        )

    def _look(self) -> tuple[list[int], list[tuple[int, ...]], list[torch.Size], list[int], list[nn.Module | None]]:
        # `module.to(...)` and `parameter.data = ...` keep the parameter and change what is in it. The old memory is kept
        # alive by the plan, so that what is new is elsewhere, or is another view of it.
        addresses = list(map(Tensor.data_ptr, self._locals))
        strides = list(map(Tensor.stride, self._locals))
        sizes = list(map(Tensor.size, self._locals))
        children = list(chain.from_iterable(map(dict.values, self._children)))
        return addresses, strides, sizes, list(map(len, self._folders)), children


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor (a `DTensor`, as FSDP2 makes them), and any other tensor as it is."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local.detach()


def why_not_averaged(tensor: Tensor) -> str | None:
    """Return why a tensor cannot be averaged, and what to do; nothing if it can."""
    if tensor.is_quantized:
        return "it is quantized; average the model before it is quantized"
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        return f"its layout is {kind}; keep it dense, or keep it out of the state"
    if any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
        return "several of its numbers share memory, as expand() makes them; register a clone() of it"
    if not _is_computed_with(tensor.dtype):
        return f"torch cannot compute with {str(tensor.dtype).removeprefix('torch.')}; keep it out of the state"
    return None


@cache
def _is_computed_with(dtype: torch.dtype) -> bool:
    """Return whether torch can copy numbers of this dtype, and widen those with a point: some it can only store."""
    try:
        numbers = torch.empty(1, dtype=dtype).clone()
        if dtype.is_floating_point:
            numbers.float()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.data_ptr(), tensor.stride(), tensor.shape
