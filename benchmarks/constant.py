"""The floor of all servers here: a bare ASGI application that answers with a constant."""

from typing import Any

_BODY = b'{"outputs":[[0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1.0]]}'
_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(_BODY)).encode())],
}
_END = {"type": "http.response.body", "body": _BODY}


async def app(scope: dict[str, Any], _: Any, send: Any) -> None:
    """Answer anything, body unread."""
    if scope["type"] == "http":
        await send(_START)
        await send(_END)


if __name__ == "__main__":
    import sys

    import uvicorn

    uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="warning", lifespan="off")
