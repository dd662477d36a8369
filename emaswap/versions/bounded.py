"""Building a module within bounds: what a factory allocates is looked at before it is allocated."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from emaswap.files import memory

_WORTH_A_LOOK = 1 << 20


_aten = torch.ops.aten
# What initializations are made of: operations that set a tensor's numbers in place, and change nothing else of it.
_SETTING = frozenset(
    {
        _aten.add_.Scalar,
        _aten.add_.Tensor,
        _aten.clamp_.default,
        _aten.div_.Scalar,
        _aten.div_.Tensor,
        _aten.erfinv_.default,
        _aten.fill_.Scalar,
        _aten.mul_.Scalar,
        _aten.mul_.Tensor,
        _aten.normal_.default,
        _aten.sub_.Scalar,
        _aten.sub_.Tensor,
        _aten.uniform_.default,
        _aten.zero_.default,
    }
)


class Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, tensors are made in this thread only as far as memory and a number of bytes in all allow.

    Making one raises `Short` when this process may not use so much memory just now, and `MemoryError` beyond that number,
    which `exceeded` says then. Looked at are operations that are given a size, as those that make parameters are.
    """

    def __init__(self, limit: float = math.inf, *, to_be_filled: bool = False) -> None:
        """Allow so many bytes in all. Parameters that are `to_be_filled` are not initialized.

        They will have other numbers in a moment, and to draw 25 million takes a tenth of a second. Buffers are
        initialized: those that are no state keep what they get.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = limit
        self.to_be_filled = to_be_filled
        self.total = 0
        self.exceeded = False

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation of torch, unless it would allocate too much."""
        kwargs = kwargs or {}
        if self.to_be_filled and func in _SETTING and isinstance(args[0], nn.Parameter):
            return args[0]
        parameters = func._schema.arguments
        if parameters and parameters[0].name == "size" and args and str(kwargs.get("device")) != "meta":
            self._allow(args[0], kwargs.get("dtype"))
        return func(*args, **kwargs)

    def _allow(self, size: Iterable[int], dtype: Any) -> None:
        count = math.prod(size) * (dtype.itemsize if dtype is not None else 4)
        self.total += count
        if self.total > self.limit:
            self.exceeded = True
            raise MemoryError(f"more than {self.limit} bytes in all")
        if count >= _WORTH_A_LOOK:
            memory.require(count, "one tensor of the module")
