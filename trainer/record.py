"""Recorder: writes a run's metrics over optimizer steps for people, for programs and for TensorBoard."""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from emaswap import EmaswapError
from trainer import events
from trainer.plot import plot_accuracy

log = logging.getLogger(__name__)

_LINES = "metrics.jsonl"
_PICTURE = "accuracy.png"


class Recorder:
    """Writes what a run measures to a folder; a context manager.

    - `metrics.jsonl`: one object per line, with `step`, `wall_time` (seconds since the epoch) and the metrics by name.
      Steps increase from line to line. A metric that is not finite is `null`, since JSON has no NaN.
    - `events.out.tfevents.*`: the same scalars for TensorBoard.
    - `accuracy.png`: raw and EMA accuracy over the whole file, drawn at the end.

    A run that resumes in the folder of an earlier one replaces what the earlier one recorded of later steps: its first
    write cuts those lines off and tells TensorBoard to hide those scalars. So a run from step 0 starts a new record.
    """

    def __init__(self, folder: Path | None, step: int | None = None) -> None:
        """Record to `folder`, or nowhere if it is `None`. Nothing is touched before the first write.

        `step` is how many steps the run has made so far. Without it, everything recorded before the first step written
        here is kept.
        """
        self._folder = folder
        self._step = step
        self._lines: _Tail | None = None
        self._scalars: _Tail | None = None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step. Raises `EmaswapError` when that fails; the next write may succeed."""
        if self._folder is None:
            return
        wall_time = time.time()
        try:
            lines, scalars = self._opened(self._folder, step)
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            lines.append(json.dumps({"step": step, "wall_time": wall_time, **finite}).encode() + b"\n")
            self._step = step
            scalars.append(events.scalars(step, wall_time, metrics))
        except OSError as error:
            raise EmaswapError(f"cannot record step {step} in {self._folder}: {error.strerror or error}") from error

    def close(self) -> None:
        """Draw the picture if there is something to draw. Raises `EmaswapError` when it cannot be written."""
        if self._folder is None or self._lines is None:
            return
        self._lines = self._scalars = None
        try:
            _draw(self._folder)
        except OSError as error:
            raise EmaswapError(f"cannot draw the record in {self._folder}: {error.strerror or error}") from error
        except Exception:  # whatever matplotlib raises, a picture is no reason to fail
            log.warning("cannot draw the record in %s", self._folder, exc_info=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, and log a failure as a warning, so that it does not hide how the block ended."""
        try:
            self.close()
        except EmaswapError as failure:
            log.warning("%s", failure)

    def _opened(self, folder: Path, step: int) -> tuple["_Tail", "_Tail"]:
        """Return the files of lines and of scalars, ready for the records of a step."""
        back = self._step is not None and step <= self._step
        if self._scalars is None:
            self._scalars = _Tail(folder / events.file_name())
        if self._lines is None or back:
            folder.mkdir(parents=True, exist_ok=True)
            kept = step - 1 if self._step is None else min(self._step, step - 1)
            self._scalars.append(events.start(kept + 1))
            self._lines = _Tail(folder / _LINES, _size_until(folder / _LINES, kept))
        return self._lines, self._scalars


class _Tail:
    """A file that grows by whole records: the remains of a failed write are cut off before the next one."""

    def __init__(self, path: Path, size_bytes: int = 0) -> None:
        self._path, self._size_bytes = path, size_bytes

    def append(self, record: bytes) -> None:
        # Opened each time, so that no buffer outlives a full disk and readers see the record at once.
        with self._path.open("ab") as file:
            start = min(self._size_bytes, file.tell())
            file.truncate(start)
            file.write(record)
        self._size_bytes = start + len(record)


def _size_until(path: Path, step: int) -> int:
    """Return how many bytes of a file of lines to keep so that it ends with that step; 0 if there is no file."""
    size = 0
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                record = _parsed(line)
                if not line.endswith(b"\n") or (record is not None and record["step"] > step):
                    break
                size += len(line)
    return size


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line, or `None` if the line is not a record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _draw(folder: Path) -> None:
    """Draw the accuracies of all lines that have both of them."""
    names = "step", "raw_accuracy", "ema_accuracy"
    with (folder / _LINES).open("rb") as file:
        records = [record for line in file if (record := _parsed(line)) is not None]
    # A `null` is a gap in the curve.
    points = [
        tuple(math.nan if record[name] is None else record[name] for name in names)
        for record in records
        if all(name in record for name in names)
    ]
    if points:
        steps, raw, ema = zip(*points, strict=True)
        plot_accuracy(folder / _PICTURE, steps, raw, ema)
