"""Publisher: puts an average's weights into a store without holding up the training loop.

`publish()` copies the weights on the calling thread and returns; recording the probe, digesting, writing and
committing happen on a thread of its own. When that thread is busy, the newest snapshot waits and older ones give way.
"""

import logging
import random
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import nn

from emaswap.averaging.model_ema import ModelEMA
from emaswap.errors import BadVersion, EmaswapError, Fenced, PublishError
from emaswap.files.digest import Algorithm
from emaswap.priority import give_way
from emaswap.publishing.snapshot import MAIN, Layout, PrivateCopy, Staging, layout_of
from emaswap.store import Store, open_store
from emaswap.store.line import Term
from emaswap.store.retention import Retention
from emaswap.tensors import dtype_name, named_tensors, not_finite, plain_name
from emaswap.versions import architecture as architectures
from emaswap.versions.manifest import (
    Architecture,
    EmaInfo,
    Manifest,
    ProbeInfo,
    TensorInfo,
    TrainingInfo,
    Variant,
    WeightsInfo,
)
from emaswap.versions.probe import Probe, tolerances
from emaswap.versions.signature import Inputs, Signature

log = logging.getLogger(__name__)


class Publisher:
    """One run's publisher of one model. Use it from one thread; close it, or use it as a context manager."""

    def __init__(
        self,
        store: Store | str | Path,
        *,
        model: str,
        architecture: Architecture | str,
        probe: Inputs,
        signature: Signature | None = None,
        keep: int = 10,
        grace_s: float = 60.0,
        algorithm: Algorithm = "blake3",
        dtype: torch.dtype | None = None,
        calibrate: Callable[[nn.Module], object] | None = None,
        on_publish: Callable[[Manifest], None] | None = None,
    ) -> None:
        """Take the next term at the store.

        Args:
            store: a store, or the path of one; the directory is made when it is not there.
            model: the model's name; a store holds versions of one model.
            architecture: the factory that the service builds the module from, and its arguments
                (`Architecture.of(Net, width=32)`, or "package.module:Net" when it takes none).
            probe: a few typical inputs, rows first; several inputs by name. Their answers travel with each version.
            signature: names, dtypes and shapes of inputs and outputs; by default what the probe shows.
            keep: how many of the newest versions retention keeps.
            grace_s: the age in seconds below which retention keeps every version.
            algorithm: the digest's algorithm.
            dtype: what floating-point parameters are rounded to in the store, such as `torch.bfloat16`: half the bytes.
                Services compute in the module's own precision; buffers, and the average itself, are not rounded.
            calibrate: called on the publisher's thread with each private copy before its probe is recorded, for what
                the average needs before it is used: `functools.partial(recalibrate, batches=...)` for batch norm.
            on_publish: called with each committed manifest, on the publisher's thread.

        Raises:
            StoreError: the store cannot be written.
            PublishError: the store holds another model, or the architecture cannot be built.
        """
        self.store = store if isinstance(store, Store) else open_store(store)
        self.published = 0
        self.latest: Manifest | None = None
        self._architecture = Architecture(factory=architecture) if isinstance(architecture, str) else architecture
        if self._architecture.factory.startswith("__main__:"):
            raise PublishError(
                f"no service can import {self._architecture.factory}: move the class into a module of its own"
            )
        # What a service will build, to compare with what is published. It is built here and not in the background,
        # where it would draw from the random numbers that training goes on with.
        self._candidate: nn.Module | None = self._build()
        self._layout: Layout | None = None
        self._probe_inputs = _copied(probe)
        self._signature = signature
        self._algorithm = algorithm
        self._dtype = dtype
        self._calibrate = calibrate
        self._on_publish = on_publish
        self._term = Term(self.store, model)
        self._model = model
        self._retention = Retention(self.store, keep=keep, grace_s=grace_s)
        self._retention.clean()

        self._lock = threading.Lock()
        self._pending: PrivateCopy | None = None
        self._spare: list[PrivateCopy] = []
        self._staging = Staging()
        self._error: EmaswapError | None = None
        self._working: Future[None] | None = None
        # An executor's thread finishes its work when the interpreter exits, even if nobody calls close().
        self._executor = ThreadPoolExecutor(1, "emaswap-publisher", initializer=give_way)

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
            averaged: how a plain module came about, where another library averaged it; a `ModelEMA` tells that itself.

        Raises:
            ValueError: `averaged` was given beside a `ModelEMA`.
            PublishError: an *earlier* snapshot could not be published. The one of this call is on its way all the same.
            Fenced: another publisher has taken the store over; nothing more can be published from here.
        """
        if averaged is not None and isinstance(ema, ModelEMA):
            raise ValueError("a ModelEMA tells itself how it was averaged: leave out averaged=")
        if isinstance(self._error, Fenced):
            raise self._error
        with self._lock:
            snapshot = self._pending or (self._spare.pop() if self._spare else PrivateCopy())
            snapshot.take(ema, TrainingInfo(step=step, metrics=dict(metrics or {})), self._staging, averaged)
            self._pending = snapshot
            if self._working is None:
                try:
                    self._working = self._executor.submit(self._work)
                except RuntimeError as error:
                    raise PublishError("this publisher is closed") from error
        self._raise_error()

    def flush(self) -> None:
        """Wait until everything snapshotted so far is published (or superseded). Raises like `publish`."""
        with self._lock:
            working = self._working
        if working is not None:
            working.result()
        self._raise_error()

    def close(self) -> None:
        """Publish what is pending, and end. Raises like `publish`."""
        self._executor.shutdown(wait=True)
        self._raise_error()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _raise_error(self) -> None:
        error = self._error
        if error is not None:
            if not isinstance(error, Fenced):
                self._error = None
            raise error

    def _work(self) -> None:
        """Publish pending snapshots until there is none."""
        while True:
            with self._lock:
                snapshot, self._pending = self._pending, None
                if snapshot is None or isinstance(self._error, Fenced):
                    self._working = None
                    return
            try:
                self.latest = self._write(snapshot)
                self.published += 1
                self._tell(self.latest)
            except Fenced as error:
                log.error("%s", error)
                self._error = error
            except Exception as error:  # it must reach the training loop, whatever it is
                self._fail(f"step {snapshot.training.step} was not published: {error}", error)
            self._spare.append(snapshot)

    def _tell(self, manifest: Manifest) -> None:
        try:
            if self._on_publish:
                self._on_publish(manifest)
        except Exception as error:  # it is the user's own
            self._fail(f"version {manifest.version} is published, but on_publish failed: {error}", error)

    def _fail(self, message: str, cause: Exception) -> None:
        log.warning("%s", message)
        self._error = PublishError(message)
        self._error.__cause__ = cause

    def _write(self, snapshot: PrivateCopy) -> Manifest:
        snapshot.wait()
        parts = {name: self._add(name, snapshot) for name in snapshot.modules}
        main = parts.pop(MAIN)
        assert self._signature is not None
        signature = self._signature
        manifest = self._term.commit(
            lambda place: Manifest(
                model=self._model,
                version=place.version,
                term=place.term,
                run=place.run,
                parent=place.parent,
                created_at=datetime.now(UTC),
                weights=main.weights,
                architecture=self._architecture,
                signature=signature,
                ema=main.ema,
                training=snapshot.training,
                probe=main.probe,
                variants=parts,
            )
        )
        log.info("published version %d (step %d)", manifest.version, manifest.training.step)
        self._prune()
        return manifest

    @torch.no_grad()
    def _add(self, name: str, snapshot: PrivateCopy) -> Variant:
        """Prove one of a snapshot's modules right, and put its weights and its probe into the store."""
        module = snapshot.modules[name]
        if self._calibrate is not None:
            self._calibrate(module)
        narrowed = {key: value.to(self._dtype) for key, value in _wider(module, self._dtype).items()}
        tensors = named_tensors(module)
        for key, value in narrowed.items():
            tensors[key].copy_(value)  # what is recorded and proven below are the answers of the rounded weights
        if bad := not_finite(tensors):
            raise PublishError(
                f"weights that are not finite would be rejected: {', '.join(bad[:5])} (for a mask of infinities, "
                "register_buffer(..., persistent=False))"
            )
        if self._signature is None:
            self._signature = Signature.infer(module, self._probe_inputs)
        probe = Probe.record(module, self._signature, self._probe_inputs)
        rtol, atol = tolerances(tensors, torch.device("cpu"))
        self._prove(module, probe, self._signature)

        stored = tensors | narrowed
        weights = self.store.add_tensors("weights", stored, self._algorithm)
        recorded = self.store.add_tensors("probes", probe.to_tensors(), self._algorithm)
        return Variant(
            weights=WeightsInfo(
                digest=weights.digest,
                size=weights.size,
                tensors={
                    key: TensorInfo(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))
                    for key, tensor in stored.items()
                },
            ),
            ema=snapshot.infos[name],
            probe=ProbeInfo(digest=recorded.digest, size=recorded.size, rtol=rtol, atol=atol),
        )

    def _build(self) -> nn.Module:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        try:
            return architectures.build(self._architecture, trusted=[self._architecture.factory])
        except BadVersion as error:
            raise PublishError(f"what no service can build is not published: {error.detail}") from error
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.set_rng_state(states[2])

    def _prove(self, module: nn.Module, probe: Probe, signature: Signature) -> None:
        """Do once what every service will do, so that a wrong factory shows here and not in front of users."""
        layout = layout_of(module)
        if self._candidate is None:
            if layout != self._layout:
                raise PublishError("it is not a module like the ones published before: make a publisher of its own")
            return
        tensors = named_tensors(module)
        rtol, atol = tolerances(tensors, torch.device("cpu"))
        try:
            architectures.fill(self._candidate, tensors)
            probe.compare(probe.replay(self._candidate, signature), rtol=rtol, atol=atol)
        except BadVersion as error:
            raise PublishError(
                f"{self._architecture.factory} does not build the module that is published: {error}"
            ) from error
        self._candidate, self._layout = None, layout

    def _prune(self) -> None:
        try:
            self._retention.prune()
        except EmaswapError as error:
            log.warning("old versions were not pruned: %s", error)


def _copied(inputs: Inputs) -> Inputs:
    """Copies on the CPU: the caller's own may change, or be where the snapshots are not."""
    if isinstance(inputs, torch.Tensor):
        return inputs.detach().cpu().clone()
    return {name: value.detach().cpu().clone() for name, value in inputs.items()}


def _wider(module: nn.Module, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The module's floating-point parameters that take more bytes than this dtype; buffers are small, and stay."""
    if dtype is None:
        return {}
    names = {plain_name(name) for name, _ in module.named_parameters()}
    return {
        name: tensor
        for name, tensor in named_tensors(module).items()
        if name in names and tensor.is_floating_point() and tensor.dtype.itemsize > dtype.itemsize
    }
