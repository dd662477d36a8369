"""The FastAPI application over the parts of a service. Its lifespan starts and stops them."""

import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header
from fastapi.responses import Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emaswap import __version__
from service.parts import Following, Service, compute_with
from service.settings import ServiceSettings
from service.web import open_inference_routes, refused
from service.web.admin import Admin
from service.web.body import ClientGone, read
from service.web.endpoint import Endpoint
from service.web.predict import Predict
from service.web.relay import Relay
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
from service.web.token import Token
from service.workers.worker import Worker

# 422 by name, too, or FastAPI would document a form of its own for it.
_PROBLEMS: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in ("4XX", 422, 503)}

_MAX_ADMIN_BODY_BYTES = 64 << 10


def create_app(settings: ServiceSettings) -> FastAPI:
    """Return the ASGI application of a service in one process."""
    service = Service(settings)
    predict = _predict(service)
    app = create_control_app(service, Endpoint(predict), closing=predict.close)
    app.state.predict = predict
    add_cors(app, settings)
    return app


def create_control_app(
    service: Following[Any], endpoint: ASGIApp, *, closing: Callable[[], None] = lambda: None
) -> FastAPI:
    """Return the application over what follows a store, with requests for predictions going to an endpoint.

    `closing` is called at the end.
    """
    token = Token.read(service.settings.admin_token_file, "admin")
    admin = Admin(service.store, service.conductor, token, lambda: service.draining)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield
        admin.close()
        closing()

    app = FastAPI(
        title="emaswap",
        version=__version__,
        description="The EMA weights of a running training job. Every answer names the version that made it.",
        lifespan=lifespan,
        responses=_PROBLEMS,
        redirect_slashes=False,
    )
    app.add_middleware(_HeadAsGet)
    app.state.service = service
    app.router.routes += [_predict_route(endpoint), *open_inference_routes.infer_routes(endpoint, _PROBLEMS)]
    app.include_router(open_inference_routes.routes(service))
    app.include_router(_model_routes(service))
    app.include_router(_admin_routes(admin, service.settings))
    app.include_router(_probe_routes(service))
    refused.install(app)
    return app


def create_worker_app(worker: Worker, supervisor: Path) -> Starlette:
    """Return the application of a worker: it answers predictions, and relays the rest to its supervisor's socket."""
    settings = worker.settings
    predict = _predict(worker)
    endpoint, relay = Endpoint(predict), Relay(supervisor, settings.root_path.rstrip("/"))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        compute_with(settings.threads, worker.flip.workers)
        worker.start()
        yield
        predict.close()
        worker.close()
        await relay.close()

    app = Starlette(lifespan=lifespan)
    app.state.service = worker
    app.state.predict = predict
    app.router.routes += [
        _predict_route(endpoint),
        *open_inference_routes.infer_routes(endpoint, _PROBLEMS),
        Mount("/", relay),
    ]
    refused.install(app)
    add_cors(app, settings)
    return app


def _predict(parts: Service | Worker) -> Predict:
    return Predict(
        parts.answering,
        parts.settings,
        standing=lambda: parts.standing,
        draining=lambda: parts.draining,
        token=Token.read(parts.settings.predict_token_file, "predict"),
    )


def add_cors(app: Starlette, settings: ServiceSettings) -> None:
    """Let pages of other origins ask, where the settings name some."""
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Model-Version", "X-Model-Digest", "Inference-Header-Content-Length"],
        )


class _HeadAsGet:
    """Answers HEAD as GET would be answered; the server leaves out the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


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


def _model_routes(service: Following[Any]) -> APIRouter:
    routes = APIRouter(prefix="/model", tags=["model"])

    @routes.get("/version")
    async def version() -> LiveVersion:
        """Everything known about the live version."""
        standing = service.standing
        if standing.live is None:
            raise refused.no_live_version(standing.status)
        return LiveVersion.of(standing.live, standing, datetime.now(UTC))

    @routes.get("/versions")
    async def versions() -> Versions:
        """Return the newest versions with their states, and why the rejected ones were rejected."""
        return Versions.of(service.standing)

    return routes


def _admin_routes(admin: Admin, settings: ServiceSettings) -> APIRouter:
    class Guarded(APIRoute):
        """A route whose body is not even read before the token is checked, and then not beyond its bound."""

        async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
            admin.authorize(dict(scope["headers"]).get(b"authorization", b""))
            try:
                body = await read(receive, max_bytes=_MAX_ADMIN_BODY_BYTES, timeout_s=settings.body_timeout_s)
            except ClientGone:
                return
            whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def replay() -> Message:
                return whole.pop() if whole else await receive()

            await super().handle(scope, replay, send)

    routes = APIRouter(prefix="/model", tags=["operators"], route_class=Guarded)

    @routes.post("/pin")
    async def pin(request: PinRequest) -> PinState:
        """Serve this version, whatever is newer, until the pin is removed. It holds across restarts and replicas."""
        return await admin.pin(request.version, request.reason)

    @routes.delete("/pin")
    async def unpin() -> PinState:
        """Return to the newest version."""
        return await admin.unpin()

    @routes.post("/refresh")
    async def refresh() -> PinState:
        """Look at the store now."""
        return await admin.refresh()

    return routes


def _probe_routes(service: Following[Any]) -> APIRouter:
    routes = APIRouter(tags=["operations"])

    @routes.get("/healthz")
    async def healthz() -> Health:
        """Answer that the process is alive."""
        return Health(status="alive")

    @routes.get("/readyz", responses={503: {"model": Readiness}})
    async def readyz(response: Response) -> Readiness:
        """200 when a version is live and the service is not draining; 503 otherwise, and why."""
        reason, live = service.unready, service.slot.current
        response.status_code = 200 if reason is None else 503
        return Readiness(ready=reason is None, version=live.version if live else None, reason=reason)

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return all metrics in the text format of Prometheus."""
        await service.gather()
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    return routes
