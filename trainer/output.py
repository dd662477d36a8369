"""Output: what a run produces. Versions, checkpoints, recorded metrics, the heartbeat and the display.

Only the leading rank has one. Training can do without any of it: a failure is a warning, unless another trainer has
taken over the store.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch

from emaswap import EmaswapError, Publisher, Store
from trainer.display import Display
from trainer.evaluation import evaluate
from trainer.record import Recorder
from trainer.run import Run
from trainer.settings import TrainerSettings
from trainer.tasks import Task


class Output:
    """All output of one run; a context manager."""

    def __init__(self, settings: TrainerSettings, task: Task, run: Run, display: Display) -> None:
        """Take the next term at the store. Raises `EmaswapError` when the store cannot be opened."""
        assert run.ema is not None, "the leading rank averages"
        self._settings, self._task, self._run, self._ema, self._display = settings, task, run, run.ema, display
        self._publisher = open_publisher(settings, task, display)
        self._recorder = Recorder(settings.log_dir, run.steps)
        self._recorded = run.steps, time.monotonic()
        self._failing: set[str] = set()

    def __enter__(self) -> Self:
        if self._run.steps > newest_step(self._publisher.store):
            self._keep()  # the previous process ended before it published what it had reached
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._try(self._recorder.close)
        self._publisher.close()

    def step(self, *, last: bool) -> None:
        """Produce what is due after a step, which may be the `last` one."""
        self._display.step(self._run.steps)
        if self._settings.heartbeat:
            self._try(self._settings.heartbeat.touch, often="heartbeat")
        due = last or self._run.steps % self._settings.publish_every == 0
        metrics = self._keep() if due else {}
        if self._settings.log_dir and (due or self._run.steps % self._settings.log_every == 0):
            self._try(lambda: self._recorder.write(self._run.steps, self._figures() | metrics), often="record")

    def _keep(self) -> dict[str, float]:
        """Evaluate, publish and save the present state; return the metrics."""
        metrics = evaluate(self._task, self._run.model, self._ema, self._run.learner.precision)
        metrics["train_loss"] = self._run.loss_average.get().item()
        self._display.evaluated(metrics)
        self._publisher.publish(self._ema, step=self._run.steps, metrics=metrics)
        self._try(self._run.save)
        return metrics

    def _figures(self) -> dict[str, float]:
        """Return the figures to record for this step."""
        (before, then), now = self._recorded, (self._run.steps, time.monotonic())
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
        """Call `work`, which training can do without: a full disk, say, must not end a run.

        For work that is done `often`, name it: a repeated failure is then reported once, until the work succeeds again.
        """
        try:
            work()
        except Exception as error:  # whatever it is, the run is worth more
            if often not in self._failing:
                what = str(error) if isinstance(error, EmaswapError) else f"{type(error).__name__}: {error}"
                self._display.say(f"warning: {what}; training continues")
            self._failing |= {often} - {""}
        else:
            self._failing.discard(often)


def open_publisher(settings: TrainerSettings, task: Task, display: Display) -> Publisher:
    """Open a publisher of the task's model."""
    return Publisher(
        settings.store,
        name=task.name,
        architecture=task.architecture(),
        signature=task.signature(),
        probe=task.probe(),
        keep=settings.keep,
        dtype=getattr(torch, settings.publish_dtype) if settings.publish_dtype else None,
        on_publish=display.published,
        strict=True,
    )


def newest_step(store: Store) -> int:
    """Return the training step of the newest version, or 0 if there is no readable version."""
    manifest = store.readable(store.newest())
    return manifest.training.step if manifest else 0
