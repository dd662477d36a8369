"""The application: wires the parts together. The lifespan owns what must be started and closed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any

import torch
from fastapi import APIRouter, FastAPI, Header
from fastapi.responses import Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from emaswap import __version__, open_store
from emaswap.device import pick_device
from service.control.lifecycle import History
from service.control.loader import Loader
from service.control.watcher import Watcher
from service.metrics import Metrics
from service.serving.batcher import Batcher
from service.serving.slot import Slot
from service.settings import ServiceSettings
from service.web import refused
from service.web.admin import Admin, read_token
from service.web.predict import Predict
from service.web.schemas import (
    Health,
    LiveVersion,
    PinRequest,
    PinState,
    PredictRequest,
    PredictResponse,
    Problem,
    Readiness,
    Versions,
)

# 422 by name, too, or FastAPI would document a form of its own for it.
_PROBLEMS: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in ("4XX", 422, 503)}

_MAX_ADMIN_BODY_BYTES = 64 << 10


class Service:
    """The parts of one running service, and whether it is draining."""

    def __init__(self, settings: ServiceSettings) -> None:
        """Raises `EmaswapError` when a setting cannot be met: a store of an unknown kind, no such device, no token."""
        self.settings = settings
        self.draining = False
        self.slot = Slot()
        self.history = History()
        self.metrics = Metrics(self.slot)
        loader = Loader(
            open_store(settings.store),
            trusted=settings.trusted,
            device=pick_device(settings.device),
            variant=settings.variant,
        )
        self.watcher = Watcher(self.slot, loader, self.history, self.metrics, poll_s=settings.poll_s)
        self.batcher = Batcher(
            self.slot,
            self.metrics,
            max_rows=settings.max_batch_rows,
            max_waiting=settings.max_waiting,
            max_waiting_bytes=settings.max_waiting_bytes,
            forward_timeout_s=settings.forward_timeout_s,
            on_broken=self.watcher.give_up,
        )
        self.admin = Admin(self.watcher, self.history, read_token(settings.admin_token_file))
        self.predict = Predict(
            self.slot,
            self.batcher,
            self.metrics,
            settings,
            status=lambda: self.watcher.status,
            draining=lambda: self.draining,
        )

    @contextlib.asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Follow the store for as long as the application runs."""
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        watching = asyncio.create_task(self.watcher.run(), name="watcher")
        try:
            yield
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
            self.watcher.close()
            self.batcher.close()


def create_app(settings: ServiceSettings) -> FastAPI:
    """The ASGI application for these settings."""
    service = Service(settings)
    app = FastAPI(
        title="emaswap",
        version=__version__,
        description="The EMA weights of a running training job. Every answer names the version that made it.",
        lifespan=service.running,
        responses=_PROBLEMS,
    )
    app.state.service = service
    app.router.routes.append(_predict_route(service.predict))
    app.include_router(_model_routes(service))
    app.include_router(_admin_routes(service))
    app.include_router(_probe_routes(service))
    refused.install(app)
    return app


def _predict_route(endpoint: ASGIApp) -> APIRoute:
    async def predict(
        request: PredictRequest,
        x_min_model_version: Annotated[int | None, Header(description="412 if an older version is live.")] = None,
    ) -> PredictResponse:
        """Run rows through the live version. The answer, also in X-Model-Version and X-Model-Digest, says which it was."""
        raise NotImplementedError  # FastAPI documents this function; what answers is the endpoint

    route = APIRoute("/predict", predict, methods=["POST"], tags=["predict"], responses=_PROBLEMS)
    route.app = endpoint
    return route


def _model_routes(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/model", tags=["model"])

    @routes.get("/version")
    async def version() -> LiveVersion:
        """Everything known about the live version."""
        live = service.slot.current
        if live is None:
            raise refused.no_live_version(service.watcher.status)
        return LiveVersion.of(live, service.watcher.pin, datetime.now(UTC))

    @routes.get("/versions")
    async def versions() -> Versions:
        """The newest versions with their states, and why the rejected ones were rejected."""
        watcher = service.watcher
        return Versions.of(service.slot.current, watcher.pin, watcher.status, service.history.newest_first())

    return routes


def _admin_routes(service: Service) -> APIRouter:
    class Guarded(APIRoute):
        """A route whose body is not even read before the token is checked."""

        async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
            service.admin.authorize(Headers(scope=scope).get("authorization"))
            await super().handle(scope, receive, send)

    routes = APIRouter(prefix="/model", tags=["operators"], route_class=Guarded)

    @routes.post("/pin", max_body_size=_MAX_ADMIN_BODY_BYTES)
    async def pin(request: PinRequest) -> PinState:
        """Serve this version, whatever is newer, until the pin is removed. It holds across restarts and replicas."""
        return await service.admin.pin(request.version, request.reason)

    @routes.delete("/pin")
    async def unpin() -> PinState:
        """Return to the newest version."""
        return await service.admin.unpin()

    @routes.post("/refresh")
    async def refresh() -> PinState:
        """Look at the store now."""
        return await service.admin.refresh()

    return routes


def _probe_routes(service: Service) -> APIRouter:
    routes = APIRouter(tags=["operations"])

    @routes.get("/healthz")
    async def healthz() -> Health:
        """The process is alive."""
        return Health(status="alive")

    @routes.get("/readyz", responses={503: {"model": Readiness}})
    async def readyz(response: Response) -> Readiness:
        """200 when a version is live and the service is not draining; 503 otherwise, and why."""
        live = service.slot.current
        reason = "draining" if service.draining else None if live else service.watcher.status
        response.status_code = 200 if reason is None else 503
        return Readiness(ready=reason is None, version=live.version if live else None, reason=reason)

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """All metrics in the text format of Prometheus."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return routes
