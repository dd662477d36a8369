"""The parts of one service, started and stopped together. Knows no web framework: the routes ask here for what they need."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import torch
from prometheus_client import CollectorRegistry, Gauge, disable_created_metrics

from emaswap import BadVersion, __version__, open_store
from emaswap.device import pick_device, processors
from service.control.conductor import Conductor
from service.control.loader import OwnLoader
from service.control.metrics import ControlMetrics
from service.control.notices import Notices
from service.control.standing import Standing
from service.control.watcher import Watcher
from service.serving.batcher import Batcher
from service.serving.metrics import ServingMetrics
from service.serving.servable import Servable
from service.serving.slot import Slot
from service.settings import ServiceSettings


class Service:
    """A service: a slot, what fills it, what answers from it, and whether it is draining."""

    def __init__(self, settings: ServiceSettings) -> None:
        """Raises `EmaswapError` when a setting cannot be met: a store of an unknown kind, no such device."""
        self.settings = settings
        self.draining = False
        self.registry = _new_registry()
        self.slot: Slot[Servable] = Slot()
        self.store = open_store(settings.store)
        loader = OwnLoader(
            self.store,
            trusted=settings.trusted,
            device=pick_device(settings.device),
            variant=settings.variant,
            max_bytes=settings.max_model_bytes,
        )
        self.conductor = Conductor(
            self.slot,
            loader,
            ControlMetrics(self.registry, self.slot),
            poll_s=settings.poll_s,
            load_timeout_s=settings.load_timeout_s,
            guard_s=settings.guard_s,
        )
        path = self.store.watch_path
        self.watcher = Watcher(self.conductor, Notices(path) if path else None, poll_s=settings.poll_s)
        self.serving_metrics = ServingMetrics(self.registry)
        self.batcher = Batcher(
            self.slot,
            self.serving_metrics,
            max_rows=settings.max_batch_rows,
            max_waiting=settings.max_waiting,
            max_waiting_bytes=settings.max_waiting_bytes,
            forward_timeout_s=settings.forward_timeout_s,
            on_broken=self.give_up,
            batching=settings.batching,
        )

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

    def give_up(self, servable: Servable, error: BadVersion) -> None:
        """Reject a version that turned out broken while it answered, and look for another at once."""
        self.conductor.give_up(servable, error)
        self.watcher.wake()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow the store for as long as the context lasts."""
        torch.set_num_threads(self.settings.threads or max(1, processors() // 2))
        watching = asyncio.create_task(self.watcher.run(), name="watcher")
        try:
            yield
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
            self.conductor.close()
            self.batcher.close()


def _new_registry() -> CollectorRegistry:
    """Return a registry that tells the release; each service in a process has one of its own."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the number of series, and nobody plots them
    registry = CollectorRegistry()
    Gauge("emaswap_info", "1, labelled with the release of emaswap.", ["release"], registry=registry).labels(
        __version__
    ).set(1)
    return registry
