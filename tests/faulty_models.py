"""Networks that keep things where the next forward pass finds them, and others that fail in all the ways there are."""

import asyncio
import math
import os
import threading
import time
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import Linear

TRUST = ("tests.models.*", "tests.faulty_models.*")


class Keeping(Linear):
    """Keeps its rows on `self` from one line of `forward` to the next."""

    rows: Tensor

    def forward(self, rows: Tensor) -> Tensor:
        self.rows = rows
        time.sleep(0.002)
        return super().forward(self.rows)


class Overwriting(nn.Module):
    """Writes every answer into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.answer = torch.empty(64, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.mul(rows, self.scale, out=self.answer[: len(rows)])


class Unspeakable(Exception):
    """An exception that has no text."""

    def __str__(self) -> str:
        raise ValueError("no text")


class _Hang:
    """Where forward passes hang until a test lets go of them."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def __deepcopy__(self, _: object) -> "_Hang":
        return self


hang = _Hang()

# What a row that begins with a number makes `Moody` do.
FAILURES: dict[float, Any] = {
    10: ValueError("no such row"),
    11: ValueError("begin" + "x" * (20 << 20)),
    12: Unspeakable(),
    13: StopIteration(),
    14: SystemExit(3),
    15: asyncio.CancelledError(),
    16: KeyError("no \ud800 row"),
    20: MemoryError(),
    21: RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
    22: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    23: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    24: OSError(12, "Cannot allocate memory"),
}
ALLOCATES, COMPLEX, NOTHING, BREAKS, HANGS = 25, 30, 31, 40, 50


class Moody(Linear):
    """A `Linear` whose rows decide by their first number whether and how it fails. Once broken, it stays so."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False

    def forward(self, rows: Tensor) -> Any:
        for first in rows[:, 0].tolist():
            if first in FAILURES:
                raise FAILURES[first]
            if first == ALLOCATES:
                torch.empty(1 << 50)
            if first == HANGS:
                assert hang.over.wait(60)
            if first == BREAKS:
                self.broken = True
        if self.broken:
            raise RuntimeError("this module is broken")
        out = super().forward(rows)
        if (rows[:, 0] == COMPLEX).any():
            return out.to(torch.complex64)
        return out if (rows[:, 0] != NOTHING).all() else out[:, :0]


class Fragile(nn.Module):
    """The first number of each row, NaN for one that is not below the weight; without a weight, NaN below zero."""

    def __init__(self, below: float = math.inf) -> None:
        super().__init__()
        self.below = nn.Parameter(torch.tensor(float(min(below, 1e9))))

    def forward(self, rows: Tensor) -> Tensor:
        first = rows[:, :1]
        return torch.where((first >= self.below) | (first < 0), torch.nan, first)


class Pair(nn.Module):
    """Refuses two rows that are each all right alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, rows: Tensor) -> Tensor:
        if len(set(rows[:, 0].tolist())) == len(rows) > 4:
            raise ValueError("all of them differ")
        return rows * self.weight


class Deadly(nn.Module):
    """With a weight above a thousand, ends the process that runs it or hangs in it, as DEADLY in the environment says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, rows: Tensor) -> Tensor:
        if self.weight.item() > 1000:
            if os.environ.get("DEADLY") == "exit":
                os._exit(7)
            if os.environ.get("DEADLY") == "hang":
                time.sleep(600)
        return rows * self.weight
