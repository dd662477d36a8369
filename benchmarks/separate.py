"""Publishing from a process of its own, to measure what that would save over the publisher's thread."""

import os
from multiprocessing.synchronize import Event, Semaphore
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

import torch
import torch.multiprocessing
from torch import nn

from emaswap import Architecture, ModelEMA, Publisher


class _Signals(NamedTuple):
    go: Semaphore
    idle: Semaphore
    stop: Event


class SeparatePublisher:
    """Copies the weights to shared memory; another process, at niceness 10, publishes them from there."""

    def __init__(self, store: Path, module: nn.Module, *, model: str, probe: torch.Tensor) -> None:
        context: Any = torch.multiprocessing.get_context("spawn")
        self._shared = module.share_memory()
        self._signals = _Signals(context.Semaphore(0), context.Semaphore(0), context.Event())
        self._process = context.Process(target=_serve, args=(store, self._shared, model, probe, self._signals))
        self._process.start()

    @torch.no_grad()
    def publish(self, ema: ModelEMA) -> None:
        """Hand the weights over, unless the other process is still busy with the ones before."""
        if self._signals.idle.acquire(block=False):
            torch._foreach_copy_(list(self._shared.parameters()), list(ema.ema.parameters()))
            self._signals.go.release()

    def flush(self) -> None:
        """Wait until the other process is idle."""
        if not self._signals.idle.acquire(timeout=120):
            raise TimeoutError("the publishing process did not become idle")
        self._signals.idle.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signals.stop.set()
        self._signals.go.release()
        self._process.join()


def _serve(store: Path, module: nn.Module, model: str, probe: torch.Tensor, signals: _Signals) -> None:
    os.nice(10)
    torch.set_num_threads(1)
    architecture = Architecture.of(cast(Any, type(module)))
    with Publisher(store, model=model, architecture=architecture, probe=probe, keep=2, grace_s=0) as publisher:
        while True:
            signals.idle.release()
            signals.go.acquire()
            if signals.stop.is_set():
                return
            publisher.publish(module)
            publisher.flush()
