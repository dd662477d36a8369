"""Networks that cannot be loaded as long as a test says so."""

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.models import Linear

TRUST = ("tests.models.*", "tests.troubled_models.*")


@dataclass
class Trouble:
    """What the factory and the forward pass of `Troubled` raise; whether they hang; and what ends all hanging."""

    factory: BaseException | None = None
    forward: BaseException | None = None
    factory_hangs: bool = False
    forward_hangs: bool = False
    over: threading.Event = field(default_factory=threading.Event)

    def meet(self, error: BaseException | None, *, hangs: bool) -> None:
        """Raise the error, or hang."""
        if error is not None:
            raise error
        if hangs:
            assert self.over.wait(60)


trouble = Trouble()


class Troubled(Linear):
    """A `Linear` that meets the trouble there is."""

    def __init__(self) -> None:
        super().__init__()
        trouble.meet(trouble.factory, hangs=trouble.factory_hangs)

    def forward(self, rows: Tensor) -> Tensor:
        trouble.meet(trouble.forward, hangs=trouble.forward_hangs)
        return super().forward(rows)


class Untroubled(Linear):
    """A `Linear` that another publisher publishes."""


def endless() -> None:
    """Hang as a factory, in a process of its own, which no test can let go."""
    threading.Event().wait(600)


SHORTAGES = {
    "memory": MemoryError(),
    "memory of the CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"
    ),
    "memory of the device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "handles": OSError(24, "Too many open files"),
    "disk": OSError(28, "No space left on device"),
    "permission": PermissionError(13, "Permission denied"),
}
