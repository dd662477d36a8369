"""The watcher: looks at the store, asks the policy, and carries out what it says.

Everything that blocks (the store, loading, warming) runs on one thread of low priority, never on the event loop.
"""

import asyncio
import contextlib
import random
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import structlog
from watchfiles import awatch

from emaswap import BadVersion, Missing, Pin, Reason, StoreError
from emaswap.priority import give_way
from emaswap.store.line import Line
from emaswap.store.look import Look
from service.control.lifecycle import History, State
from service.control.loader import Loader
from service.control.metrics import ControlMetrics
from service.control.policy import Known, Load, decide
from service.serving.servable import Servable
from service.serving.slot import Slot

log = structlog.get_logger("emaswap.service")

# How long changes are gathered before the watcher is told of them.
_SETTLE_MS = 20
# Versions that one look may load in a row before the caller gets its turn again.
_LOADS_PER_LOOK = 20

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Rejection:
    """Why a version was rejected, and the stamps of its files then: other bytes deserve another try."""

    error: BadVersion
    stamps: dict[str, str | None]


class Watcher:
    """Keeps a slot at the version that the store's state calls for."""

    def __init__(self, slot: Slot, loader: Loader, history: History, metrics: ControlMetrics, *, poll_s: float) -> None:
        """Follow the store that the loader reads, with a look at it every `poll_s` seconds or so."""
        self.store = loader.store
        self.slot = slot
        self.loader = loader
        self.history = history
        self.metrics = metrics
        self.poll_s = poll_s
        self.pin: Pin | None = None
        self.status = "the store has not been looked at yet"
        self._rejected: dict[int, _Rejection] = {}
        self._line = Line(self.store)
        self._seen = Look(())
        self._look = asyncio.Lock()
        self._changed = asyncio.Event()
        self._executor = ThreadPoolExecutor(1, "emaswap-loader", initializer=give_way)

    async def run(self) -> None:
        """Follow the store until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._notice_changes())
            while True:
                self._changed.clear()
                await self.look()
                # Jitter keeps a fleet of replicas from asking all at once.
                timeout = self.poll_s * random.uniform(0.8, 1.2)  # noqa: S311
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), timeout)

    async def look(self) -> None:
        """Look at the store now, and do what the policy says until it says to stay. Never raises for a bad version."""
        async with self._look:
            for loads in range(_LOADS_PER_LOOK):
                try:
                    known = await self.on_thread(self._known)
                    action = decide(known)
                    if not isinstance(action, Load):
                        self._settle(action.why, quietly=loads > 0)
                        return
                    self.status = f"loading version {action.version}"
                    await self.on_thread(lambda version=action.version: self._load(version))  # type: ignore[misc]
                except StoreError as error:
                    self.metrics.store_errors.inc()
                    self._settle(str(error))
                    return
                except Exception as error:  # whatever it is, the live version goes on and so does the watch
                    log.exception("the look at the store failed")
                    self._settle(f"the look at the store failed: {type(error).__name__}: {error}")
                    return

    async def on_thread(self, work: Callable[[], Result]) -> Result:
        """Run something that blocks on the watcher's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def give_up(self, servable: Servable, error: BadVersion) -> None:
        """Reject a version that turned out broken while it was live, and look for another to take its place."""
        self._executor.submit(lambda: self._reject(servable.version, error, self.store.stamps(servable.version), {}))
        self._changed.set()

    def close(self) -> None:
        """End the thread, once what it is at is done."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _settle(self, status: str, *, quietly: bool = False) -> None:
        """Note where things stand, with a line in the log unless that has just been said by another."""
        rejection = self._rejected.get(self.pin.version) if self.pin else None
        if rejection:
            status = f"{status}: {rejection.error}"
        if status != self.status and not quietly:
            log.info("watching", status=status)
        self.status = status

    async def _notice_changes(self) -> None:
        """Set `_changed` when the file system tells of a change. The poll goes on all the same; this only is quicker."""
        while True:
            path = self.store.watch_path
            if path is None or not await asyncio.to_thread(path.is_dir):
                await asyncio.sleep(self.poll_s)
                continue
            try:
                async for _ in awatch(path, recursive=False, debounce=_SETTLE_MS, step=5, watch_filter=None):
                    self._changed.set()
            except Exception as error:  # no inotify here, or no more of it: the poll alone will do
                log.warning("watching without notifications", error=str(error))
            await asyncio.sleep(self.poll_s)

    # -- on the watcher's thread ------------------------------------------------------------------------------------

    def _known(self) -> Known:
        self._seen = self.store.look()
        versions = self._seen.numbers
        self.pin = self._seen.pin
        self.history.discover(versions)
        live = self.slot.current.version if self.slot.current else None
        self.metrics.saw(self._seen.newest, self.pin)
        self._reconsider()
        return Known(live, versions, self.pin.version if self.pin else None, frozenset(self._rejected))

    def _reconsider(self) -> None:
        """Forget a rejection whose bytes have changed, or of a stale term that an operator has pinned all the same."""
        for version, rejection in list(self._rejected.items()):
            if self._seen.get(version) is None:
                del self._rejected[version]  # pruned: what is remembered of it stays
                continue
            ordered = rejection.error.reason is Reason.STALE_TERM and self.pin and self.pin.version == version
            if ordered or self.store.stamps(version) != rejection.stamps:
                del self._rejected[version]
                self.history.enter(version, State.DISCOVERED)

    def _load(self, version: int) -> None:
        """Load a version and let it go live, or reject it."""
        stamps = self.store.stamps(version)
        timings_s: dict[str, float] = {}
        try:
            manifest = self.store.manifest(version)
            if self.pin is None or self.pin.version != version:
                self._line.check(manifest, self._seen)
            self.history.enter(version, State.DISCOVERED, digest=manifest.weights.digest, step=manifest.training.step)
            servable = self.loader.load(
                manifest,
                live=self.slot.current,
                enter=lambda state: self.history.enter(version, state),
                timings_s=timings_s,
            )
        except Missing:
            return  # pruned between listing and reading: the next look sees what there is now
        except BadVersion as error:
            if error.reason is Reason.FILE_MISSING and not self.store.has(version):
                return  # pruned while it was being read, manifest first
            self._reject(version, error, stamps, timings_s)
            return
        except MemoryError as error:
            self._reject(version, BadVersion(Reason.FACTORY_FAILED, f"out of memory: {error}"), stamps, timings_s)
            return
        self._go_live(servable, timings_s)

    def _reject(
        self, version: int, error: BadVersion, stamps: dict[str, str | None], timings_s: dict[str, float]
    ) -> None:
        self._rejected[version] = _Rejection(error, stamps)
        self.metrics.rejected.labels(reason=error.reason).inc()
        self.history.enter(version, State.REJECTED, reason=error.reason, detail=error.detail, timings_s=timings_s)
        live = self.slot.current
        log.warning(
            "version rejected",
            version=version,
            reason=str(error.reason),
            detail=error.detail,
            timings_s=timings_s,
            live=live.version if live else None,
        )

    def _go_live(self, servable: Servable, timings_s: dict[str, float]) -> None:
        version = servable.version
        self.history.enter(version, State.LIVE, timings_s=timings_s)
        before = self.slot.swap(servable)
        if before is not None:
            self.history.enter(before.version, State.PREVIOUS)
            weakref.finalize(before, self._retire, before.version).atexit = False
        self.metrics.went_live(servable, timings_s)
        log.info(
            "version live",
            version=version,
            digest=servable.digest,
            step=servable.manifest.training.step,
            previous=before.version if before else None,
            publish_to_served_s=round(servable.publish_to_served_s, 4),
            drift=servable.drift,
            timings_s=timings_s,
        )

    def _retire(self, version: int) -> None:
        live = self.slot.current
        if live is None or live.version != version:  # a version can be live again by then
            self.history.enter(version, State.RETIRED)
