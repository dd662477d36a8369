"""The parts of one service, started and stopped together. Knows no web framework: the routes ask here for what they need."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Generic

import torch
from prometheus_client import CollectorRegistry, Gauge, disable_created_metrics

from emaswap import BadVersion, __version__, open_store
from emaswap.device import pick_device, processors
from service.control.conductor import Conductor
from service.control.loader import Loader, OwnLoader
from service.control.metrics import ControlMetrics
from service.control.notices import Notices
from service.control.standing import Standing
from service.control.watcher import Watcher
from service.serving.batcher import Batcher
from service.serving.metrics import ServingMetrics
from service.serving.servable import Servable
from service.serving.slot import Live, Slot
from service.settings import ServiceSettings


class Following(Generic[Live]):
    """What follows a store: a slot, what fills it, and how things stand."""

    def __init__(self, settings: ServiceSettings, slot: Slot[Live], loader: Loader[Live]) -> None:
        """Fill the slot with what the loader loads from its store."""
        self.settings = settings
        self.slot = slot
        self.store = loader.store
        self.draining = False
        self.registry = _new_registry()
        self.conductor = Conductor(
            slot,
            loader,
            ControlMetrics(self.registry, slot),
            poll_s=settings.poll_s,
            load_timeout_s=settings.load_timeout_s,
            guard_s=settings.guard_s,
        )
        Gauge("emaswap_workers", "Processes that answer.", registry=self.registry).set_function(lambda: self.workers)
        path = self.store.watch_path
        self.watcher = Watcher(self.conductor, Notices(path) if path else None, poll_s=settings.poll_s)

    @property
    def standing(self) -> Standing:
        """How things stand now."""
        return self.conductor.standing

    @property
    def unready(self) -> str | None:
        """Why requests should go elsewhere; `None` when they should come."""
        if self.draining:
            return "draining"
        standing = self.standing
        return None if standing.live else standing.status

    @property
    def workers(self) -> int:
        """How many processes answer."""
        return 1

    def give_up(self, broken: Live, error: BadVersion) -> None:
        """Reject a version that turned out broken while it answered, and look for another at once."""
        self.conductor.give_up(broken, error)
        self.watcher.wake()

    async def gather(self) -> None:
        """Bring the metrics up to date, before they are scraped."""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow the store for as long as the context lasts."""
        watching = asyncio.create_task(self.watcher.run(), name="watcher")
        try:
            yield
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
            self.conductor.close()


class Answering:
    """What answers: a slot, the batcher that runs requests through what is in it, and what is measured of that."""

    def __init__(
        self,
        settings: ServiceSettings,
        slot: Slot[Servable],
        metrics: ServingMetrics,
        on_broken: Callable[[Servable, BadVersion], None],
    ) -> None:
        """Where a version turns out broken, `on_broken` is told."""
        self.slot = slot
        self.metrics = metrics
        self.batcher = Batcher(
            slot,
            metrics,
            max_rows=settings.max_batch_rows,
            max_waiting=settings.max_waiting,
            max_waiting_bytes=settings.max_waiting_bytes,
            forward_timeout_s=settings.forward_timeout_s,
            on_broken=on_broken,
            batching=settings.batching,
        )


class Service(Following[Servable]):
    """A service in one process, which follows a store and answers."""

    def __init__(self, settings: ServiceSettings) -> None:
        """Raises `EmaswapError` when a setting cannot be met: a store of an unknown kind, no such device."""
        loader = OwnLoader(
            open_store(settings.store),
            trusted=settings.trusted,
            device=pick_device(settings.device),
            variant=settings.variant,
            max_bytes=settings.max_model_bytes,
        )
        super().__init__(settings, Slot(), loader)
        self.answering = Answering(settings, self.slot, ServingMetrics(self.registry), self.give_up)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow the store, and answer, for as long as the context lasts."""
        compute_with(self.settings.threads, 1)
        async with super().running():
            yield
        self.answering.batcher.close()


def compute_with(threads: int, workers: int) -> None:
    """Have torch compute with so many threads in this process, one of several workers; 0 for half of the processors."""
    torch.set_num_threads(threads or max(1, processors() // 2 // workers))


def _new_registry() -> CollectorRegistry:
    """Return a registry that tells the release; each service in a process has one of its own."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the number of series, and nobody plots them
    registry = CollectorRegistry()
    Gauge("emaswap_info", "1, labelled with the release of emaswap.", ["release"], registry=registry).labels(
        __version__
    ).set(1)
    return registry
