"""Ultralytics: `publish_from(yolo, ...)` publishes the average that its trainer keeps, once an epoch.

Uses only the public interface of its callbacks (`add_callback`, `trainer.ema`, `trainer.epoch`, `trainer.metrics`) and
imports nothing of it. Ultralytics is licensed under AGPL-3.0, and a service that serves its networks runs its code.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from emaswap.averaging.schedule import window
from emaswap.errors import Fenced
from emaswap.integrations.bridge import Publishing, is_stop, warn_of
from emaswap.store import Store
from emaswap.tensors import dtype_name
from emaswap.versions.architecture import Architecture
from emaswap.versions.manifest import EmaInfo, ScheduleInfo
from emaswap.versions.signature import Inputs


class _Average(Protocol):
    ema: nn.Module
    updates: int
    decay: Callable[[int], float]


class _Trainer(Protocol):
    ema: _Average
    epoch: int
    metrics: Mapping[str, object] | None


class _Model(Protocol):
    def add_callback(self, event: str, func: Callable[[Any], None]) -> object: ...


def _unchanged(network: nn.Module) -> nn.Module:
    return network


def publish_from(
    yolo: _Model,
    store: Store | str | Path,
    *,
    name: str,
    architecture: Architecture | str,
    probe: Inputs,
    every_n_epochs: int = 1,
    wrap: Callable[[nn.Module], nn.Module] = _unchanged,
    **publisher: Any,
) -> None:
    """Have `yolo.train()` publish the averaged weights of its trainer.

    A publish that fails is a warning; `Fenced` ends training. A run stopped by Ctrl-C publishes its last average.

    Args:
        yolo: the model whose `train` is called afterwards.
        store: a store or its path.
        name: the model's name; a store holds versions of one model.
        architecture: what the service builds the module from: a function of yours that makes the network.
        probe: a few typical inputs, rows first.
        every_n_epochs: publish a version every so many epochs, and one at the end.
        wrap: makes the module to publish from the network, if the network does not return plain tensors.
        publisher: further arguments of `Publisher` (`signature`, `keep`, `on_publish`, ...).
    """
    publisher |= {"name": name, "architecture": architecture, "probe": probe}
    publishing = Publishing(store, every=1, **publisher)
    events = _Events(publishing, every_n_epochs, wrap)
    for event in ("on_train_start", "on_train_batch_end", "on_fit_epoch_end", "on_train_end", "teardown"):
        yolo.add_callback(event, getattr(events, event))


class _Events:
    """Handlers of the events of a training run. A version's step is the number of updates of the average."""

    def __init__(self, publishing: Publishing, every: int, wrap: Callable[[nn.Module], nn.Module]) -> None:
        if every < 1:
            raise ValueError(f"expected an interval of 1 or more epochs between versions, got {every}")
        self._publishing = publishing
        self._every = every
        self._wrap = wrap
        self._whole: int | None = None
        """The updates of the average when it was last known to be whole, while training."""

    def on_train_start(self, trainer: _Trainer) -> None:
        others = torch.distributed.is_available() and torch.distributed.is_initialized()
        publishes = not others or torch.distributed.get_rank() == 0
        self._publishing.open(step=trainer.ema.updates, publishes=publishes)
        self._whole = trainer.ema.updates

    def on_train_batch_end(self, trainer: _Trainer) -> None:
        self._whole = trainer.ema.updates

    def on_fit_epoch_end(self, trainer: _Trainer) -> None:
        # This comes once more after the last epoch, with nothing new; then no version is due.
        if (trainer.epoch + 1) % self._every == 0:
            self._publish(trainer)

    def on_train_end(self, trainer: _Trainer) -> None:
        self._whole = None
        self._publish(trainer)
        self._publishing.close()

    def teardown(self, trainer: _Trainer) -> None:
        # Ultralytics calls this in a `finally` block, where the exception that ends training can be seen. An average
        # that was interrupted in the middle of an update is not published.
        if is_stop(sys.exception()) and self._whole is not None and self._whole == trainer.ema.updates:
            with suppress(Fenced):
                self._publish(trainer)
        self._whole = None
        self._publishing.abandon()

    def _publish(self, trainer: _Trainer) -> None:
        self._publishing.advance(trainer.ema.updates)
        warn_of(partial(self._offer, trainer.ema, trainer.metrics or {}))

    def _offer(self, average: _Average, metrics: Mapping[str, object]) -> None:
        self._publishing.publish(self._wrap(average.ema), metrics, averaged=_described(average))


def _described(average: _Average) -> EmaInfo:
    """Describe an average whose schedule is a function by its present decay."""
    decay = average.decay(average.updates)
    dtype = next((dtype_name(each.dtype) for each in average.ema.parameters()), "none")
    schedule = ScheduleInfo.model_validate({"name": "ultralytics", "decay": decay})
    return EmaInfo(schedule=schedule, updates=average.updates, window=window(decay), dtype=dtype)
