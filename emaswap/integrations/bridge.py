"""What all integrations do: publish now and then, keep an average where the framework has none, never end a run for it.

Knows no framework. The framework's own module calls these methods when its hooks are called.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from emaswap.averaging.model_ema import ModelEMA, unwrap
from emaswap.averaging.schedule import Schedule
from emaswap.errors import Fenced
from emaswap.publishing.publisher import Publisher
from emaswap.store import Store
from emaswap.versions.architecture import Architecture
from emaswap.versions.manifest import EmaInfo
from emaswap.versions.signature import Inputs

log = logging.getLogger(__name__)


class Publishing:
    """Publishes every so many steps, and at the end. What cannot be published is a warning; training goes on."""

    def __init__(
        self,
        store: Store | str | Path,
        *,
        model: str,
        architecture: Architecture | str,
        probe: Inputs,
        every: int,
        **publisher: Any,
    ) -> None:
        """Nothing is opened before `open`. `publisher`: what else `Publisher` takes."""
        if every < 1:
            raise ValueError(f"versions are published every 1 or more, got {every}")
        publisher |= {"name": model, "architecture": architecture, "probe": probe}
        inspect.signature(Publisher).bind(store, **publisher)  # a misspelt name shows here and not when training begins
        self.model_name = model
        self.publisher: Publisher | None = None
        self._open = partial(Publisher, store, **publisher)
        self._every = every
        self._step = self._published_step = 0
        self._due = False

    def open(self, *, step: int = 0, publishes: bool = True) -> None:
        """Training begins at this step. One process of a run `publishes`. Raises like `Publisher` when it cannot."""
        self._step = self._published_step = step
        self._due = False
        self.publisher = self._open() if publishes else None

    def advance(self, step: int) -> None:
        """So many steps are made. A version may be due now: it is published once the metrics of this step are known."""
        # Steps may come by twos and threes (several optimizers) and pass over the multiple.
        self._due |= step // self._every > self._step // self._every
        self._step = step

    def publish(
        self,
        average: ModelEMA | nn.Module,
        metrics: Mapping[str, object],
        *,
        averaged: EmaInfo | None = None,
        last: bool = False,
    ) -> None:
        """Publish if a version is due, or if it is the last chance and anything has changed. Raises `Fenced` only."""
        if self.publisher is None or not (self._due or (last and self._step != self._published_step)):
            return
        self._due, self._published_step = False, self._step
        figures = _figures(metrics)
        warn_of(partial(self.publisher.publish, average, step=self._step, metrics=figures, averaged=averaged))

    def close(self) -> None:
        """Wait until everything is published. Raises `Fenced` only."""
        publisher, self.publisher = self.publisher, None
        if publisher is not None:
            warn_of(publisher.close)

    def abandon(self) -> None:
        """Training has ended by an error, which is more important than any of ours: let what is under way finish."""
        with suppress(Fenced):
            self.close()


class Averaging(Publishing):
    """Keeps a `ModelEMA` of the model that trains, updated once an optimizer step, and publishes it."""

    def __init__(
        self,
        store: Store | str | Path,
        *,
        model: str,
        architecture: Architecture | str,
        probe: Inputs,
        decay: float | Schedule = 0.9999,
        every_n_steps: int = 100,
        module: str = "",
        validate_with_ema: bool = False,
        average: Callable[..., ModelEMA] = ModelEMA,
        **publisher: Any,
    ) -> None:
        """Publish the average of a model to a store while it trains.

        Args:
            store: a store, or the path of one.
            model: the model's name; a store holds versions of one model.
            architecture: what the service builds the module from: `Architecture.of(Net, width=32)`.
            probe: a few typical inputs of the module, rows first; several by name.
            decay: the average's decay or `Schedule`, as `ModelEMA` takes it.
            every_n_steps: a version every so many optimizer steps, and one at the end.
            module: the part of the model to average and publish ("net", "encoder.body"); by default all of it.
            validate_with_ema: validate the averaged weights and not the raw ones; these come back afterwards.
            average: makes the average of the module and `decay`; `functools.partial(ModelEMA, buffers="copy")`.
            publisher: what else `Publisher` takes (`signature`, `keep`, `on_publish`, ...).
        """
        super().__init__(store, model=model, architecture=architecture, probe=probe, every=every_n_steps, **publisher)
        self.ema: ModelEMA | None = None
        self._decay = decay
        self._path = module
        self._validate_with_ema = validate_with_ema
        self._make_average = average
        self._module: nn.Module | None = None
        self._saved: Mapping[str, Any] | None = None
        self._swaps = ExitStack()
        self.swapped = False

    def begin(
        self, model: nn.Module, optimizers: Iterable[Optimizer], *, step: int = 0, publishes: bool = True
    ) -> None:
        """Training begins at this step, with the state that `restore` was given. Raises like `Publisher`."""
        module = unwrap(model).get_submodule(self._path)
        if self.ema is None or module is not self._module:
            self.ema = self._make_average(module, decay=self._decay)
            self._module = module
            if step and self._saved is None:
                log.warning("training goes on at step %d, but its average starts here: there is no saved one", step)
        if self._saved is not None:
            self.ema.load_state_dict(self._saved)
            self._saved = None
        own = {id(parameter) for parameter in module.parameters()}
        for optimizer in optimizers:
            if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
                self.ema.follow(optimizer)
        self.open(step=step, publishes=publishes)

    def advance(self, step: int) -> None:
        """So many optimizer steps are made; if that is one more than before, the weights go into the average."""
        if step != self._step and self.ema is not None and self._module is not None:
            self.ema.update(self._module)
        super().advance(step)

    def publish_average(self, metrics: Mapping[str, object], *, last: bool = False) -> None:
        """`publish` the average, once there is one."""
        if self.ema is not None:
            self.publish(self.ema, metrics, last=last)

    def finish(self, metrics: Mapping[str, object]) -> None:
        """Training has ended as it should: publish what it has come to."""
        self.swap_out()
        self.publish_average(metrics, last=True)
        self.close()

    def abandon(self) -> None:
        self.swap_out()
        super().abandon()

    def saved(self) -> dict[str, Any]:
        """The average's state, for a training checkpoint; empty before there is one."""
        return dict(self._saved or {}) if self.ema is None else self.ema.state_dict()

    def restore(self, state: Mapping[str, Any]) -> None:
        """The average goes on from here when training begins."""
        self._saved = state

    def swap_in(self) -> None:
        """Validation begins: the model has the averaged weights until `swap_out`, if that is wanted."""
        if self._validate_with_ema and not self.swapped and self.ema is not None and self._module is not None:
            self._swaps.enter_context(self.ema.swapped_into(self._module))
            self.swapped = True

    def swap_out(self) -> None:
        """The model has its own weights again. Does nothing when it has them already."""
        self.swapped = False
        self._swaps.close()


def _figures(metrics: Mapping[str, object]) -> dict[str, float]:
    """Those of the logged metrics that are numbers."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
    }


def warn_of(work: Callable[[], object]) -> None:
    """Do something that training can do without. Raises `Fenced` only: such a run must end."""
    try:
        work()
    except Fenced:
        raise
    except Exception as error:  # whatever it is, a version is not worth a training run
        log.warning("%s; training goes on", error)
