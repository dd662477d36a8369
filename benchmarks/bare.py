"""Nothing but the writing: what any publisher costs that puts as many bytes into files."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import nn

from emaswap import ModelEMA
from emaswap.priority import give_way


class BareWriter:
    """Writes and fsyncs the weights on a thread of niceness 10, without a copy, digest or proof, and keeps two files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._executor = ThreadPoolExecutor(1, initializer=give_way)
        self._working: Future[None] | None = None
        self._written = 0

    def publish(self, ema: ModelEMA) -> None:
        """Write the weights as they are, or not at all while the ones before are being written."""
        if self._working is None or self._working.done():
            self._working = self._executor.submit(self._write, ema.ema)

    def flush(self) -> None:
        """Wait until nothing is being written."""
        if self._working is not None:
            self._working.result()

    def _write(self, module: nn.Module) -> None:
        with (self._folder / str(self._written)).open("wb", buffering=0) as file:
            for parameter in module.parameters():
                file.write(parameter.numpy().data)
            os.fsync(file.fileno())
        (self._folder / str(self._written - 2)).unlink(missing_ok=True)
        self._written += 1
