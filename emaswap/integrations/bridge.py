"""What all integrations share: keep an average, publish it now and then, and never end a training run for it.

Knows no framework. A framework's module calls these methods from the framework's own hooks.
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

from emaswap.averaging.averaged_module import unwrap
from emaswap.averaging.model_ema import ModelEMA
from emaswap.averaging.schedule import Schedule
from emaswap.errors import Fenced, PublishError
from emaswap.integrations.shield import shield
from emaswap.publishing.publisher import Publisher
from emaswap.store import Store
from emaswap.versions.architecture import Architecture
from emaswap.versions.manifest import EmaInfo
from emaswap.versions.signature import Inputs

log = logging.getLogger(__name__)


class Publishing:
    """Publishes at intervals and at the end. A version that cannot be published is a warning; training continues."""

    def __init__(self, store: Store | str | Path, *, every: int, **publisher: Any) -> None:
        """Check the arguments, of which `publisher` are those of `Publisher`. `open` opens the store."""
        if every < 1:
            raise ValueError(f"expected an interval of 1 or more between versions, got {every}")
        inspect.signature(Publisher).bind(store, **publisher)  # so that a misspelt name fails here, not during training
        self.publisher: Publisher | None = None
        self._open = partial(Publisher, store, **publisher)
        self._every = every
        self._step = self._published_step = 0
        self._due = False

    def open(self, *, step: int = 0, publishes: bool = True) -> None:
        """Begin training at this step. Only one process of a run `publishes`. Raises what `Publisher` raises."""
        self.abandon()
        self._step = self._published_step = step
        self._due = False
        self.publisher = self._open() if publishes else None

    def advance(self, step: int) -> None:
        """Note how many steps are made. A version that is due is published later, with the metrics of this step."""
        # With several optimizers a framework counts by twos or threes and may jump over the multiple.
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
        """Publish if a version is due, or if this is the `last` call and there is something new. Raises only `Fenced`."""
        if self.publisher is None or not (self._due or (last and self._step != self._published_step)):
            return
        self._due, self._published_step = False, self._step
        with shield():
            self.publisher.publish(average, step=self._step, metrics=_numbers(metrics), averaged=averaged)

    def close(self) -> None:
        """Wait until everything is published. Raises only `Fenced`."""
        publisher, self.publisher = self.publisher, None
        if publisher is None:
            return
        with suppress(PublishError):  # the log has it
            publisher.close()
        if isinstance(publisher.error, Fenced):
            raise publisher.error

    def abandon(self) -> None:
        """Let what is being published finish, and raise nothing that could hide the error that ended training."""
        with suppress(Fenced):
            self.close()


class Averaging(Publishing):
    """Keeps a `ModelEMA` of the model in training, updates it once per optimizer step, and publishes it."""

    def __init__(
        self,
        store: Store | str | Path,
        *,
        name: str,
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
            store: a store or its path.
            name: the model's name; a store holds versions of one model.
            architecture: what the service builds the module from: `Architecture.of(Net, width=32)`.
            probe: a few typical inputs of the module, rows first; several inputs by name.
            decay: the average's decay or `Schedule`, as `ModelEMA` takes it.
            every_n_steps: publish a version every so many optimizer steps, and one at the end.
            module: the part of the model to average and publish ("net", "encoder.body"); by default all of it.
            validate_with_ema: validate the averaged weights instead of the raw ones, which are restored afterwards.
            average: makes the average from the module and `decay`, such as `functools.partial(ModelEMA, buffers="copy")`.
            publisher: further arguments of `Publisher` (`signature`, `keep`, `on_publish`, ...).
        """
        publisher |= {"name": name, "architecture": architecture, "probe": probe}
        super().__init__(store, every=every_n_steps, **publisher)
        self.name = name
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
        """Begin training at this step, with the state given to `restore`. Raises what `Publisher` raises."""
        module = unwrap(model).get_submodule(self._path)
        if self.ema is None or module is not self._module:
            self.ema = self._make_average(module, decay=self._decay)
            self._module = module
            if step and self._saved is None:
                log.warning("training resumes at step %d without a saved average: the average starts here", step)
        if self._saved is not None:
            self.ema.load_state_dict(self._saved)
            self._saved = None
        own = {id(parameter) for parameter in module.parameters()}
        for optimizer in optimizers:
            if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
                self.ema.follow(optimizer)
        self.open(step=step, publishes=publishes)

    def advance(self, step: int) -> None:
        """Note how many optimizer steps are made, and update the average if there are more than before."""
        with shield():
            if step != self._step and self.ema is not None and self._module is not None:
                self.ema.update(self._module)
            super().advance(step)

    def publish_average(self, metrics: Mapping[str, object], *, last: bool = False) -> None:
        """Publish the average as `publish` does, if there is one."""
        if self.ema is not None:
            self.publish(self.ema, metrics, last=last)

    def finish(self, metrics: Mapping[str, object]) -> None:
        """End a training run that succeeded: publish its last average. Raises only `Fenced`."""
        self.swap_out()
        self.publish_average(metrics, last=True)
        self.close()

    def fail(self, error: BaseException, metrics: Mapping[str, object]) -> None:
        """End a training run that `error` ended. If it was stopped on purpose, publish its last average; raise nothing."""
        if is_stop(error):
            with suppress(Fenced):
                self.finish(metrics)
        self.abandon()

    def abandon(self) -> None:
        self.swap_out()
        super().abandon()

    def saved(self) -> dict[str, Any]:
        """Return the average's state for a training checkpoint; it is empty before there is an average."""
        return dict(self._saved or {}) if self.ema is None else self.ema.state_dict()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Have the average resume from this state when training begins."""
        self._saved = state

    def swap_in(self) -> None:
        """Give the model the averaged weights for validation, until `swap_out`, if the settings ask for it."""
        if self._validate_with_ema and not self.swapped and self.ema is not None and self._module is not None:
            with shield():
                self._swaps.enter_context(self.ema.swapped_into(self._module))
                self.swapped = True

    def swap_out(self) -> None:
        """Give the model its own weights back, if it does not have them."""
        with shield():
            self.swapped = False
            self._swaps.close()


def is_stop(error: BaseException | None) -> bool:
    """Return whether an error is a request to stop (Ctrl-C, or a signal that a framework turned into an exit)."""
    return isinstance(error, (KeyboardInterrupt, SystemExit))


def warn_of(work: Callable[[], object]) -> None:
    """Call `work`, and log what it raises as a warning. Raises only `Fenced`, which must end training."""
    try:
        work()
    except Fenced:
        raise
    except Exception as error:  # whatever it is, a version is not worth a training run
        log.warning("%s; training continues", error)


def _numbers(metrics: Mapping[str, object]) -> dict[str, float]:
    """Return the metrics that are single numbers."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
    }
