"""Publisher: puts an average's weights into a store without holding up the training loop.

`publish()` copies the weights on the calling thread and returns; proving, digesting, writing and committing happen on a
thread of its own. While that thread is busy, the newest copy waits and replaces older ones.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import nn

from emaswap.averaging.model_ema import ModelEMA
from emaswap.errors import Fenced, PublishError
from emaswap.files.digest import Algorithm
from emaswap.priority import give_way
from emaswap.publishing.edition import Editor
from emaswap.publishing.rehearsal import rehearse
from emaswap.publishing.snapshot import Tray, state_dtypes
from emaswap.publishing.writer import Writer
from emaswap.store import Store, open_store
from emaswap.versions.architecture import Architecture, to_architecture
from emaswap.versions.manifest import MAX_NAME, EmaInfo, Manifest, TrainingInfo
from emaswap.versions.probe import Rows
from emaswap.versions.signature import Signature

log = logging.getLogger(__name__)


class Publisher:
    """One run's publisher of one model. Use it from one thread; close it, or use it as a context manager.

    A publish that fails does not end training: it is a warning in the log, counted in `failed`, and kept in `error`
    until a later one succeeds. `close` and `flush` raise when the newest weights were not published.

    Attributes:
        published: how many versions were published.
        failed: how many publishes failed.
        latest: the manifest of the last version that was published.
        error: why the last publish failed; `None` when it did not.
    """

    def __init__(
        self,
        store: Store | str | Path,
        *,
        name: str,
        architecture: Architecture | str,
        probe: Rows | Mapping[str, Rows],
        signature: Signature | None = None,
        keep: int = 10,
        grace_s: float = 60.0,
        algorithm: Algorithm = "blake3",
        dtype: torch.dtype | None = None,
        calibrate: Callable[[nn.Module], object] | None = None,
        on_publish: Callable[[Manifest], None] | None = None,
        strict: bool = False,
    ) -> None:
        """Run the probe through what the factory builds, and take the next term at the store.

        Args:
            store: a store, or the path of one; the directory is made when it is not there.
            name: the model's name; a store holds versions of one model.
            architecture: the factory that the service builds the module from, and its arguments
                (`Architecture.of(Net, width=32)`, or "package.module:Net" when it takes none).
            probe: a few typical inputs, rows first: a tensor, an array or lists; several inputs by the names of
                `forward`'s parameters. The outputs for them travel with each version.
            signature: names, dtypes and shapes of inputs and outputs; by default what the probe shows.
            keep: how many of the newest versions retention keeps.
            grace_s: the age in seconds below which retention keeps every version.
            algorithm: the digest's algorithm.
            dtype: what floating-point parameters are stored in. Where it is narrower than what the factory builds, they
                are rounded, and served in the module's own dtype; buffers, and the average itself, are not rounded.
                Where it is wider (`torch.float32` for a module in bfloat16), they are served in it. By default a
                version is stored and served in the dtypes of the module that the factory builds.
            calibrate: called on the publisher's thread with each private copy before its probe is recorded, for what
                the average needs before it is used: `functools.partial(recalibrate, batches=...)` for batch norm.
            on_publish: called with each committed manifest, on the publisher's thread.
            strict: raise what went wrong at the next call of `publish`, too.

        Raises:
            StoreError: the store cannot be written.
            PublishError: the store holds another model, or what the factory builds could never be published: it cannot
                be built, the probe does not run, or its outputs cannot be served or proven.
        """
        if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME:
            raise PublishError(f"name must be a string of 1 to {MAX_NAME} characters, got {name!r}")
        architecture = to_architecture(architecture)
        rehearsal = rehearse(architecture, probe, signature=signature, dtype=dtype)
        self.published = 0
        self.failed = 0
        self.latest: Manifest | None = None
        self.error: PublishError | None = None
        self._strict = strict
        self._on_publish = on_publish
        self._tray = Tray(state_dtypes(rehearsal.module))
        self._writer = Writer(
            Editor(architecture, rehearsal, dtype=dtype, calibrate=calibrate),
            store if isinstance(store, Store) else open_store(store),
            name,
            algorithm=algorithm,
            keep=keep,
            grace_s=grace_s,
        )
        self._untold: PublishError | None = None
        # An executor's thread finishes its work when the interpreter exits, even if nobody calls close().
        self._executor = ThreadPoolExecutor(1, "emaswap-publisher", initializer=give_way)

    @property
    def store(self) -> Store:
        """The store that is published to."""
        return self._writer.store

    def publish(
        self,
        ema: ModelEMA | nn.Module,
        *,
        step: int = 0,
        metrics: Mapping[str, float] | None = None,
        averaged: EmaInfo | None = None,
    ) -> None:
        """Copy the weights and return; they become the next version in the background.

        Args:
            ema: the average (or a plain module) to publish; its variants become the version's.
            step: the optimizer step that training is at.
            metrics: figures to keep with the version, such as raw and EMA accuracy.
            averaged: how another library averaged a plain module; a `ModelEMA` describes itself.

        Raises:
            ValueError: `averaged` was given with a `ModelEMA`.
            Fenced: another publisher has taken the store over; nothing more can be published from here.
            PublishError: this publisher is closed; or, if it is `strict`, an earlier publish failed. The weights of
                this call are being published all the same.
        """
        if averaged is not None and isinstance(ema, ModelEMA):
            raise ValueError("a ModelEMA describes its own average: leave out averaged=")
        if isinstance(self.error, Fenced):
            raise self.error
        try:
            training = TrainingInfo(step=step, metrics=dict(metrics or {}))
            is_first = self._tray.put(ema, training, averaged)
        except Exception as error:  # whatever cannot be copied, training goes on
            self._fail(step, error)
        else:
            if is_first:
                self._start()
        if self._strict:
            self._raise_untold()

    def flush(self) -> None:
        """Wait until the newest weights are published. Raises like `close`."""
        with suppress(RuntimeError):  # it is closed, so there is nothing to wait for
            self._executor.submit(int).result()
        self._raise_untold()

    def close(self) -> None:
        """Publish what is waiting, and end.

        Raises `PublishError` when the newest weights were not published, or `on_publish` failed, unless it was raised
        before. While another exception is being handled, as in a `finally` block, that one goes on instead.
        """
        under_way = sys.exc_info()[1]
        self._executor.shutdown(wait=True)
        if under_way is None:
            self._raise_untold()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=True)
        if kind is None:
            self._raise_untold()

    def _start(self) -> None:
        try:
            self._executor.submit(self._publish_waiting)
        except RuntimeError as error:
            self._tray.take()
            raise PublishError("this publisher is closed") from error

    def _publish_waiting(self) -> None:
        """Publish the copy that waits, on the publisher's thread."""
        copied = self._tray.take()
        if copied is None or isinstance(self.error, Fenced):
            return
        try:
            self.latest = self._writer.publish(copied)
        except Exception as error:  # whatever it is, it must not end this thread unnoticed
            self._fail(copied.training.step, error)
        else:
            self.published += 1
            self.error = None
            self._untold = self._untold if self._strict else None
            self._announce(self.latest)
        finally:
            self._tray.give_back(copied)

    def _announce(self, manifest: Manifest) -> None:
        log.info("published version %d (step %d)", manifest.version, manifest.training.step)
        if self._on_publish is None:
            return
        try:
            self._on_publish(manifest)
        except Exception as error:  # it is the user's own
            self._untold = PublishError(f"version {manifest.version} is published, but on_publish failed: {error}")
            self._untold.__cause__ = error
            log.warning("%s", self._untold)

    def _fail(self, step: int, cause: Exception) -> None:
        if isinstance(cause, Fenced):
            self.error = cause
        else:
            self.error = PublishError(f"step {step} was not published: {cause}")
            self.error.__cause__ = cause
        self._untold = self.error
        log.warning("%s", self.error)
        self.failed += 1  # last: who sees the count finds the reason

    def _raise_untold(self) -> None:
        """Raise what went wrong, once; `Fenced` always."""
        untold, self._untold = self._untold, None
        if isinstance(self.error, Fenced):
            raise self.error
        if untold is not None:
            raise untold
