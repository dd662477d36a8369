"""Building a module within bounds: what a factory allocates is looked at before it is allocated."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from emaswap.files import memory

_WORTH_A_LOOK = 1 << 20


class Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, tensors are made in this thread only as far as memory and a number of bytes in all allow.

    Making one raises `Short` when this process may not use so much memory just now, and `MemoryError` beyond that number,
    which `exceeded` says then. Looked at are operations that are given a size, as those that make parameters are.
    """

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = limit
        self.total = 0
        self.exceeded = False

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation of torch, unless it would allocate too much."""
        kwargs = kwargs or {}
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
