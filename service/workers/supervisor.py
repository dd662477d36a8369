"""The supervisor: follows the store for all workers. It reads and verifies a version once, and flips them together."""

import asyncio
import contextlib
import os
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from emaswap import BadVersion, Manifest, Short, open_store
from emaswap.files import tensor_file
from emaswap.store import Store
from emaswap.versions import proof
from emaswap.versions.probe import Probe
from service.control.lifecycle import State
from service.control.loader import Loader, Stage
from service.parts import Following
from service.serving.metrics import Counted
from service.serving.servable import Served
from service.serving.slot import Slot
from service.settings import ServiceSettings
from service.workers.arena import Arena
from service.workers.channel import Message
from service.workers.flip import Flip
from service.workers.fork_server import ForkServer
from service.workers.pool import Load, WorkerPool

_TELL_EVERY_S = 0.25
# What the loading thread waits longer than the conductor does for it.
_GRACE_S = 1.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared(Served):
    """A version that all workers have prepared, under the number of its load."""

    load: int


class PoolSlot(Slot[Prepared]):
    """A supervisor's slot: what is put into it, all workers answer with."""

    def __init__(self, pool: WorkerPool) -> None:
        super().__init__()
        self._pool = pool

    def swap(self, new: Prepared, *, guarded: bool = False, keep: bool = False) -> Prepared | None:
        before = super().swap(new, guarded=guarded, keep=keep)
        self._flip()
        return before

    def trust(self, version: int) -> None:
        super().trust(version)
        self._flip()

    def withdraw(self, broken: Prepared) -> None:
        super().withdraw(broken)
        self._flip()

    def find(self, load: int) -> Prepared | None:
        """Return what is live or kept ready under the number of a load."""
        return next((each for each in (self.current, self.previous) if each is not None and each.load == load), None)

    def _flip(self) -> None:
        current, previous = self.current, self.previous
        self._pool.flip(current.load if current else 0, previous.load if previous else 0)


class PoolLoader(Loader[Prepared]):
    """Reads a version into shared memory, verifies it, and has the workers build it."""

    def __init__(self, store: Store, pool: WorkerPool, settings: ServiceSettings) -> None:
        super().__init__(store, variant=settings.variant)
        self._pool = pool
        self._max_bytes = settings.max_model_bytes
        self._timeout_s = settings.load_timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Have the pool asked on the event loop that runs now."""
        self._loop = asyncio.get_running_loop()

    def _prove(self, manifest: Manifest, _live: Prepared | None, stage: Stage) -> Prepared:
        until = time.monotonic() + self._timeout_s + _GRACE_S
        arena: Arena | None = None

        def take(count: int) -> NDArray[np.uint8]:
            nonlocal arena
            arena = self._pool.arenas.take(count)
            return arena.bytes()[:count]

        try:
            with stage(State.FETCHING):
                chosen = manifest.of_variant(self._variant)
                fetched = self.store.fetch(chosen, max_bytes=self._max_bytes, into=take)
            with stage(State.VERIFYING):
                proof.check(chosen, fetched.weights)
            assert arena is not None
            load = _load(self._pool.next_number(), arena, manifest, fetched.probe, chosen.weights.size)
        except BaseException:
            if arena is not None:
                self._pool.arenas.give_back(arena)
            raise
        with stage(State.WARMING):
            return self._prepared(chosen, load, until)

    def _prepared(self, manifest: Manifest, load: Load, until: float) -> Prepared:
        assert self._loop is not None
        asked = asyncio.run_coroutine_threadsafe(self._pool.prepare(load), self._loop)
        try:
            drift = asked.result(max(0.0, until - time.monotonic()))
        except TimeoutError:
            if asked.cancel():
                raise Short("the workers did not prepare it in time") from None
            drift = asked.result()
        prepared = Prepared(manifest=manifest, loaded_at=datetime.now(UTC), drift=drift, load=load.number)
        # Once nothing answers with it any more, and also when nobody waited for it.
        weakref.finalize(prepared, _call_soon, self._loop, self._pool, load).atexit = False
        return prepared


class Supervisor(Following[Prepared]):
    """A service whose answers come from workers."""

    def __init__(self, settings: ServiceSettings, flip: Flip, fork_server: ForkServer) -> None:
        """Raises `EmaswapError` when a setting cannot be met: a store of an unknown kind."""
        self.pool = WorkerPool(flip, fork_server, self._broke, self._stand)
        self._loader = PoolLoader(open_store(settings.store), self.pool, settings)
        self._slot = PoolSlot(self.pool)
        super().__init__(settings, self._slot, self._loader)
        self._metrics = PooledMetrics()
        self.registry.register(self._metrics)

    @property
    def workers(self) -> int:
        return sum(handle.serving for handle in self.pool.handles.values())

    async def gather(self) -> None:
        self._metrics.counted = await self.pool.count()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow the store, and keep the workers, for as long as the context lasts."""
        self._loader.start()
        self.pool.start()
        telling = asyncio.create_task(self._tell(), name="tell")
        try:
            async with super().running():
                yield
        finally:
            telling.cancel()
            self.pool.close()

    async def _tell(self) -> None:
        while True:
            self.pool.tell()
            await asyncio.sleep(_TELL_EVERY_S)

    def _stand(self) -> Message:
        standing = self.standing
        pin = None if standing.pin is None else standing.pin.model_dump(mode="json")
        return {"do": "stand", "status": standing.status, "pin": pin}

    def _broke(self, load: int, error: BadVersion) -> None:
        if (prepared := self._slot.find(load)) is not None:
            self.give_up(prepared, error)


class PooledMetrics(Collector):
    """What all workers counted together."""

    def __init__(self) -> None:
        self.counted = Counted()

    def collect(self) -> Iterator[Metric]:
        """Return what was counted when it was last gathered."""
        return self.counted.families()


def _load(number: int, arena: Arena, manifest: Manifest, probe: Probe, weights_bytes: int) -> Load:
    """Return a load, with the manifest and the probe in a file without a name."""
    written = manifest.encode()
    papers = os.memfd_create("emaswap-papers", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(papers), "wb") as file:
            file.write(written)
            blob = tensor_file.write(file, probe.to_tensors())
    except BaseException:
        os.close(papers)
        raise
    sizes = {"weights_bytes": weights_bytes, "manifest_bytes": len(written), "probe_bytes": blob.size}
    return Load(number, arena, papers, sizes)


def _call_soon(loop: asyncio.AbstractEventLoop, pool: WorkerPool, load: Load) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the service has ended
        loop.call_soon_threadsafe(pool.release, load)
