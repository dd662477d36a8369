"""Networks that tests hold up, so that what waits behind them is known, and others whose answers depend on the request."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tests.models import Linear, Tokens

TRUST = ("tests.models.*", "tests.slow_models.*")


class Gate:
    """Where forward passes wait while a test keeps it closed."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._reached = threading.Event()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Keep the gate closed; whatever happens, it is open again afterwards."""
        self._reached.clear()
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def open(self) -> None:
        """Let everybody through."""
        self._open.set()

    def wait_until_reached(self) -> None:
        """Return once a forward pass stands at the gate."""
        assert self._reached.wait(30)

    def wait(self) -> None:
        """Stand at the gate until it is open."""
        self._reached.set()
        assert self._open.wait(30)


gate = Gate()


class Gated(Linear):
    """A `Linear` that waits at the gate."""

    def forward(self, rows: Tensor) -> Tensor:
        gate.wait()
        return super().forward(rows)


class GatedTokens(Tokens):
    """`Tokens` that wait at the gate."""

    def forward(self, tokens: Tensor, bias: Tensor) -> dict[str, Tensor]:
        gate.wait()
        return super().forward(tokens, bias)


class Logarithm(nn.Module):
    """The logarithm of each number: NaN for a negative one, minus infinity for zero."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, rows: Tensor) -> Tensor:
        return rows.log() * self.scale
