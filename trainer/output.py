"""Output: what a run gives out. Versions, checkpoints, recorded figures, the heartbeat, and what is displayed.

Only the leading rank has one. Training can do without all of it: what fails is a warning, unless another trainer has
taken the store over.
"""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import torch
from torch import nn

from emaswap import BadVersion, EmaswapError, Fenced, Missing, ModelEMA, Publisher, PublishError, Store
from trainer.display import Display
from trainer.precision import Precision
from trainer.record import Recorder
from trainer.run import Run
from trainer.settings import TrainerSettings
from trainer.tasks import Task


class Output:
    """Everything that leaves one run; a context manager."""

    def __init__(self, settings: TrainerSettings, task: Task, run: Run, display: Display) -> None:
        """Take the next term at the store. Raises `EmaswapError` when the store cannot be opened."""
        assert run.ema is not None, "the leading rank averages"
        self._settings, self._task, self._run, self._ema, self._display = settings, task, run, run.ema, display
        self._publisher = open_publisher(settings, task, display)
        self._recorder = Recorder(settings.log_dir, run.step)
        self._recorded = run.step, time.monotonic()
        self._failing: set[str] = set()

    def __enter__(self) -> Self:
        if self._run.step > newest_step(self._publisher.store):
            self._keep()  # the run was ended before what it had reached was published
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._try(self._recorder.close)
        if kind is None:
            close_publisher(self._publisher, self._run.step, self._display)

    def step(self, *, last: bool) -> None:
        """A step has been made, perhaps the last one."""
        self._display.step(self._run.step)
        if self._settings.heartbeat:
            self._try(self._settings.heartbeat.touch, often="heartbeat")
        due = last or self._run.step % self._settings.publish_every == 0
        metrics = self._keep() if due else {}
        if self._settings.log_dir and (due or self._run.step % self._settings.log_every == 0):
            self._try(lambda: self._recorder.write(self._run.step, self._figures() | metrics), often="record")

    def _keep(self) -> dict[str, float]:
        """Publish and save where training stands; its metrics."""
        metrics = evaluate(self._task, self._run.model, self._ema, self._run.learner.precision)
        metrics["train_loss"] = self._run.loss_average.get().item()
        self._display.evaluated(metrics)
        self._try(lambda: self._publisher.publish(self._ema, step=self._run.step, metrics=metrics))
        self._try(self._run.save)
        return metrics

    def _figures(self) -> dict[str, float]:
        """What there is to record of a step."""
        (before, then), now = self._recorded, (self._run.step, time.monotonic())
        self._recorded = now
        figures = {
            "train_loss": self._run.loss_average.get().item(),
            "learning_rate": self._run.learner.learning_rate,
            "steps_per_second": (now[0] - before) / max(now[1] - then, 1e-9),
            "ema_skipped": float(self._ema.skipped),
        }
        norm = self._run.learner.grad_norm
        return figures if norm is None else figures | {"grad_norm": norm.item()}

    def _try(self, work: Callable[[], object], often: str = "") -> None:
        """Do what training can do without: a full disk, say, is no reason to lose a run. A fenced run must end.

        What is done `often` is not warned of again before it has worked in between.
        """
        try:
            work()
        except Fenced:
            raise
        except Exception as error:  # whatever it is, the weights are worth more
            if often not in self._failing:
                what = str(error) if isinstance(error, EmaswapError) else f"{type(error).__name__}: {error}"
                self._display.say(f"warning: {what}; training goes on")
            self._failing |= {often} - {""}
        else:
            self._failing.discard(often)


def open_publisher(settings: TrainerSettings, task: Task, display: Display) -> Publisher:
    """A publisher of the task's model."""
    return Publisher(
        settings.store,
        model=task.name,
        architecture=task.architecture(),
        signature=task.signature(),
        probe=task.probe(),
        keep=settings.keep,
        dtype=getattr(torch, settings.publish_dtype) if settings.publish_dtype else None,
        on_publish=display.published,
    )


def close_publisher(publisher: Publisher, step: int, display: Display) -> None:
    """Publish what is pending. Raises what went wrong, unless the version of this last step is published all the same."""
    try:
        publisher.close()
    except PublishError as error:
        if isinstance(error, Fenced) or publisher.latest is None or publisher.latest.training.step < step:
            raise
        display.say(f"warning: {error}; the last version is published")


def newest_step(store: Store) -> int:
    """The training step of the newest version, 0 when there is none that can be read."""
    try:
        return store.manifest(store.newest()).training.step
    except (BadVersion, Missing):
        return 0


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, ema: ModelEMA, precision: Precision) -> dict[str, float]:
    """The task's metrics of the raw weights and of each average: "raw_...", "ema_..." and "ema_<variant>_..."."""
    metrics: dict[str, float] = {}
    averages = {"ema": ema.ema} | {f"ema_{name}": module for name, module in ema.variants.items()}
    for kind, module in {"raw": model.eval(), **averages}.items():
        with precision.autocast():
            found: Mapping[str, float] = task.evaluate(module, precision.device)
        metrics |= {f"{kind}_{name}": value for name, value in found.items()}
    return metrics
