"""The relay: a worker hands what it does not answer itself to its supervisor, and the answer back.

So pins reach the supervisor, and metrics and states are whole, whichever worker a client's connection has come to.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from service.refusal import Code, Refusal

# What concerns one connection, and not what is sent over it.
_OF_THE_CONNECTION = frozenset(
    [b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"trailer", b"expect", b"http2-settings"]
)
_MOST = 32
_CONNECT_TIMEOUT_S = 5.0


class Relay:
    """The ASGI application that asks the supervisor."""

    def __init__(self, path: Path, root_path: str) -> None:
        """The supervisor listens at this path of a Unix socket. It puts the root path in front of what it is asked itself."""
        self._root_path = root_path.encode()
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(path), limits=httpx.Limits(max_connections=_MOST)),
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Relay one request. Raises `Refusal` when the supervisor does not answer."""
        request = Request(scope, receive)
        path: bytes = scope["raw_path"].removeprefix(self._root_path)
        target = path + b"?" + scope["query_string"] if scope["query_string"] else path
        asked = self._client.build_request(
            scope["method"],
            httpx.URL("http://supervisor").copy_with(raw_path=target),
            headers=_passed_on(scope["headers"]),
            content=_body(request) if _has_body(request) else None,
        )
        try:
            answer = await self._client.send(asked, stream=True)
        except ClientDisconnect:
            return
        except httpx.LocalProtocolError as error:
            raise Refusal(Code.INVALID_HEADER, f"headers that cannot be passed on: {error}") from None
        except httpx.HTTPError as error:
            detail = f"the supervisor does not answer; try again later: {type(error).__name__}"
            raise Refusal(Code.SUPERVISOR_UNREACHABLE, detail) from None
        try:
            headers = _passed_on(answer.headers.raw)
            await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
            async for part in answer.aiter_raw():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await answer.aclose()

    async def close(self) -> None:
        """Close the connections to the supervisor."""
        await self._client.aclose()


def _has_body(request: Request) -> bool:
    return "content-length" in request.headers or "transfer-encoding" in request.headers


async def _body(request: Request) -> AsyncIterator[bytes]:
    async for part in request.stream():
        yield part


def _passed_on(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [
        (name.lower(), value)
        for name, value in headers
        if name.lower() not in _OF_THE_CONNECTION and name.lower() not in (b"date", b"server")
    ]
