"""Display: what a person sees of a training run, a progress bar with the latest metrics and a line for each event.

Without a terminal there is no bar, only the lines.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from emaswap import Manifest


class Display:
    """The progress of one run; a context manager."""

    def __init__(self, steps: int, console: Console | None = None, *, quiet: bool = False) -> None:
        """Display a run of `steps` steps, or without end (0). A `quiet` display shows nothing, for all ranks but one."""
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(show_speed=True),
            TextColumn("loss {task.fields[loss]}  accuracy {task.fields[raw]} raw, {task.fields[ema]} EMA"),
            TextColumn("v{task.fields[version]}"),
            TimeRemainingColumn(),
            console=console or Console(highlight=False, soft_wrap=True, quiet=quiet),
            disable=quiet,
        )
        self._bar = self._progress.add_task("training", total=steps or None, loss="-", raw="-", ema="-", version=0)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, step: int) -> None:
        """Show the number of steps made."""
        self._progress.update(self._bar, completed=step)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Show the newest smoothed training loss, and the raw and EMA accuracy."""
        loss, raw, ema = (_figure(metrics.get(name)) for name in ("train_loss", "raw_accuracy", "ema_accuracy"))
        self._progress.update(self._bar, loss=loss, raw=raw, ema=ema)

    def published(self, manifest: Manifest) -> None:
        """Announce a version that is in the store. Called on the publisher's thread."""
        self._progress.update(self._bar, version=manifest.version)
        raw, ema = (_figure(manifest.training.metrics.get(name)) for name in ("raw_accuracy", "ema_accuracy"))
        self.say(f"published version {manifest.version}  step {manifest.training.step}  accuracy {raw} raw, {ema} EMA")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(line, markup=False)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
