"""The routes of the Open Inference Protocol: what there is, whether it is ready, and inference."""

from typing import Annotated, Any

from fastapi import APIRouter, Header
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp

from emaswap import __version__
from service.control.lifecycle import State
from service.parts import Following
from service.serving.servable import Served
from service.web import refused
from service.web.open_inference import InferRequest, check_named, tensor_metadata


def routes(service: Following[Any]) -> APIRouter:
    """Return the routes that tell what there is."""
    router = APIRouter(prefix="/v2", tags=["open inference protocol"])
    _add_server(router, service)
    _add_model(router, service)
    return router


def infer_routes(endpoint: ASGIApp, responses: dict[int | str, dict[str, Any]]) -> list[APIRoute]:
    """Return the routes of inference, which an endpoint answers, documented with these further responses."""
    paths = ("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer")
    found = [
        APIRoute(path, _infer, methods=["POST"], tags=["open inference protocol"], name=path, responses=responses)
        for path in paths
    ]
    for route in found:
        route.app = endpoint
    return found


def _add_server(router: APIRouter, service: Following[Any]) -> None:
    @router.get("")
    async def server() -> dict[str, Any]:
        """What this server is."""
        return {"name": "emaswap", "version": __version__, "extensions": ["binary_tensor_data", "model_repository"]}

    @router.get("/health/live")
    async def is_live() -> dict[str, bool]:
        """Answer that the process is alive."""
        return {"live": True}

    @router.get("/health/ready")
    async def is_ready(response: Response) -> dict[str, bool]:
        """200 when a version is live and the service is not draining; 503 otherwise."""
        ready = service.unready is None
        response.status_code = 200 if ready else 503
        return {"ready": ready}

    @router.post("/repository/index")
    async def index(asked: dict[str, Any] | None = None) -> list[dict[str, str]]:
        """Return the newest versions and whether they answer; with `{"ready": true}`, those alone that do."""
        standing = service.standing
        if standing.live is None:
            return []
        found = [
            {
                "name": standing.live.manifest.model,
                "version": str(record.version),
                "state": "READY" if record.state is State.LIVE else "UNAVAILABLE",
                "reason": ""
                if record.state is State.LIVE
                else f"{record.state}: {record.detail or record.reason or ''}",
            }
            for record in standing.records
        ]
        return [each for each in found if each["state"] == "READY"] if (asked or {}).get("ready") else found


def _add_model(router: APIRouter, service: Following[Any]) -> None:
    def live(model: str, version: str | None) -> Served:
        servable: Served | None = service.slot.current
        if servable is None:
            raise refused.no_live_version(service.standing.status)
        check_named(servable, model, version)
        return servable

    @router.get("/models/{model}")
    @router.get("/models/{model}/versions/{version}")
    async def metadata(model: str, version: str | None = None) -> dict[str, Any]:
        """Return names, datatypes and shapes of inputs and outputs; 404 for any version but the live one."""
        servable = live(model, version)
        signature = servable.signature
        return {
            "name": servable.manifest.model,
            "versions": [str(servable.version)],
            "platform": "pytorch",
            "inputs": [tensor_metadata(field) for field in signature.inputs],
            # numpy has no bfloat16, so such outputs are sent as float32.
            "outputs": [
                tensor_metadata(field.model_copy(update={"dtype": "float32"}) if field.dtype == "bfloat16" else field)
                for field in signature.outputs
            ],
        }

    @router.get("/models/{model}/ready")
    @router.get("/models/{model}/versions/{version}/ready")
    async def model_is_ready(model: str, version: str | None = None) -> dict[str, Any]:
        """200 when the model, in this version where one is named, answers."""
        return {"name": model, "ready": live(model, version) is not None}


async def _infer(
    request: InferRequest,
    model: str,
    version: str | None = None,
    inference_header_content_length: Annotated[int | None, Header()] = None,
) -> dict[str, Any]:
    """Run rows through the live version, as JSON or as bytes behind it."""
    raise NotImplementedError  # FastAPI documents this function; what answers is the endpoint
