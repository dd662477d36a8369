"""Reading the body of a request, which may be neither too large nor too slow."""

import asyncio
import contextlib

from starlette.types import Receive

from service.refusal import Code, Refusal


class ClientGone(Exception):
    """The client closed the connection before it had its answer."""


async def read(receive: Receive, *, max_bytes: int, timeout_s: float) -> bytes:
    """Return the whole body.

    Args:
        receive: the connection's ASGI callable.
        max_bytes: the most that is read.
        timeout_s: the longest that the client may take.

    Raises:
        Refusal: the body is too large or too slow.
        ClientGone: the connection was closed before the end of the body.
    """
    parts: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(timeout_s):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > max_bytes:
                    raise Refusal(Code.BODY_TOO_LARGE, f"expected at most {max_bytes} bytes, got more")
                more = message.get("more_body", False)
    except TimeoutError:
        raise Refusal(Code.BODY_TIMEOUT, f"the body did not end within {timeout_s:g} s") from None
    return b"".join(parts)


async def closed(receive: Receive) -> None:
    """Return once the client has closed the connection. The body must have been read."""
    with contextlib.suppress(Exception):  # a connection that fails is closed, too
        while (await receive())["type"] != "http.disconnect":
            pass
