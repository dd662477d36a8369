"""What a refusal is over HTTP: its status, its headers and its JSON. The one place that knows."""

import re
from collections.abc import Iterator, Mapping

import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.applications import Starlette
from starlette.exceptions import HTTPException

from emaswap import Pin
from service.refusal import Code, Refusal
from service.serving.servable import Served

STATUS = {
    Code.INVALID_HTTP: 400,
    Code.INVALID_HEADER: 400,
    Code.INVALID_JSON: 400,
    Code.UNAUTHORIZED: 401,
    Code.ADMIN_IS_OFF: 403,
    Code.NOT_FOUND: 404,
    Code.UNKNOWN_VERSION: 404,
    Code.UNKNOWN_MODEL: 404,
    Code.METHOD_NOT_ALLOWED: 405,
    Code.NOT_ACCEPTABLE: 406,
    Code.HEAD_TIMEOUT: 408,
    Code.BODY_TIMEOUT: 408,
    Code.STORE_IS_READ_ONLY: 409,
    Code.VERSION_WAS_REJECTED: 409,
    Code.VERSION_TOO_OLD: 412,
    Code.BODY_TOO_LARGE: 413,
    Code.TOO_MANY_ROWS: 413,
    Code.UNSUPPORTED_MEDIA_TYPE: 415,
    Code.INVALID_REQUEST: 422,
    Code.INVALID_INPUTS: 422,
    Code.WRONG_DTYPE: 422,
    Code.WRONG_SHAPE: 422,
    Code.NOT_FINITE: 422,
    Code.MODEL_REFUSED: 422,
    Code.QUEUE_IS_FULL: 429,
    Code.HEAD_TOO_LARGE: 431,
    Code.INTERNAL_ERROR: 500,
    Code.DEADLINE_EXCEEDED: 504,
    Code.FORWARD_TIMEOUT: 503,
    Code.NO_LIVE_VERSION: 503,
    Code.OUT_OF_MEMORY: 503,
    Code.SUPERVISOR_UNREACHABLE: 503,
    Code.STORE_UNREACHABLE: 503,
    Code.VERSION_CHANGED: 503,
}

PLAIN = b"content-type: application/json\r\n"
"""The headers of an answer in JSON that has no others, as lines of HTTP."""

_RETRY_AFTER_S = "1"

# What the framework refuses by itself, by status. Anything else of it is an invalid request.
_BY_STATUS = {400: Code.INVALID_JSON, 404: Code.NOT_FOUND, 405: Code.METHOD_NOT_ALLOWED, 413: Code.BODY_TOO_LARGE}


class TooOld(Refusal):
    """The live version is older than the request demands; the answer names it, and says whether that was ordered."""

    def __init__(self, live: Served, wanted: int, pin: Pin | None) -> None:
        self.ordered = pin is not None and pin.version < wanted
        what_to_do = (
            "an operator has pinned an older one: follow that order"
            if self.ordered
            else "try again when it has arrived"
        )
        super().__init__(
            Code.VERSION_TOO_OLD,
            f"expected version {wanted} or later, version {live.version} is live; {what_to_do}",
        )
        self.live = live


def no_live_version(status: str) -> Refusal:
    """Return the refusal for the time before the first version; `status` says what the service waits for."""
    return Refusal(Code.NO_LIVE_VERSION, f"no version is live yet: {status}")


def identity(servable: Served) -> dict[str, str]:
    """Return the headers that name a version, for a proxy or a client that does not parse the body."""
    return {"X-Model-Version": str(servable.version), "X-Model-Digest": servable.digest}


def headers(refusal: Refusal) -> dict[str, str]:
    """Return the headers that a refusal has besides those of its body."""
    status = STATUS[refusal.code]
    if isinstance(refusal, TooOld):
        return identity(refusal.live)
    if status in (429, 503):
        return {"Retry-After": _RETRY_AFTER_S}
    return {"WWW-Authenticate": "Bearer"} if status == 401 else {}


def lines(refusal: Refusal) -> bytes:
    """Return all headers of a refusal but its length, as lines of HTTP."""
    return as_lines({"Content-Type": "application/json", **headers(refusal)})


def as_lines(named: Mapping[str, str]) -> bytes:
    """Return headers as lines of HTTP."""
    return "".join(f"{name.lower()}: {value}\r\n" for name, value in named.items()).encode("latin-1")


def body(refusal: Refusal, *, in_words: bool = False) -> bytes:
    """Return a refusal as JSON. Text that UTF-8 cannot hold is escaped.

    Clients of the Open Inference Protocol show `error` alone, so for them it is to have the words, too.
    """
    detail = refusal.detail.encode("utf-8", "backslashreplace").decode()
    named = {"error": f"{refusal.code}: {detail}" if in_words else str(refusal.code), "detail": detail}
    if isinstance(refusal, TooOld):
        named["reason"] = "ordered" if refusal.ordered else "behind"
    return orjson.dumps(named)


def install(app: Starlette) -> None:
    """Make an application answer everything that it refuses in this one form."""
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    in_words = request.url.path.startswith("/v2/")
    return Response(body(error, in_words=in_words), STATUS[error.code], headers(error), "application/json")


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
    return await _refused(request, Refusal(Code.INVALID_REQUEST, "; ".join(problems)))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _BY_STATUS.get(error.status_code, Code.INVALID_REQUEST)
    refusal = Refusal(code, f"{request.method} {request.url.path}: {error.detail}; see /docs")
    headers = dict(error.headers or {})
    if "Allow" in headers:
        headers["Allow"] = ", ".join(sorted({*headers["Allow"].split(", "), *_methods(request)}))
    return Response(body(refusal), error.status_code, headers, "application/json")


def _methods(request: Request) -> Iterator[str]:
    """Return the methods of all routes of a path; the framework names those of the first alone."""
    for path, operations in request.app.openapi()["paths"].items():
        if re.fullmatch(re.sub(r"{\w+}", "[^/]+", path), request.url.path):
            yield from (method.upper() for method in operations)
            if "get" in operations:
                yield "HEAD"
