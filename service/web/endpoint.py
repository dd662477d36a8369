"""POST /predict as an ASGI endpoint: for other servers than ours, and for requests that come in an unusual way."""

import asyncio
import time

from starlette.types import Receive, Scope, Send

from service.refusal import Code, Refusal
from service.web.body import ClientGone, closed, read
from service.web.head import Head, read_head
from service.web.predict import Exchange, Predict

# Only clients that wait longer are watched for leaving: most have their answer by then.
_PATIENCE_S = 0.02

Answer = tuple[int, bytes, bytes]


class Endpoint:
    """The ASGI application that FastAPI routes to and documents."""

    def __init__(self, predict: Predict) -> None:
        self._predict = predict

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        settings = self._predict.settings
        path: bytes = scope["raw_path"].removeprefix(scope.get("root_path", "").encode())
        head = read_head(path, scope["headers"], self._predict.rules)
        exchange = _Awaited(self._predict, head, b"", time.perf_counter())
        whole = False
        try:
            if head.refusal is not None and head.refusal.code is Code.BODY_TOO_LARGE:
                raise head.refusal
            exchange.body = await read(receive, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
            whole = True
            self._predict.arrive(exchange)
        except ClientGone:
            return
        except Refusal as refusal:
            self._predict.refuse(exchange, refusal)
        except Exception as error:
            self._predict.failed(exchange, error)
        try:
            status, lines, body = await self._wait(exchange, receive)
        except ClientGone:
            return
        headers = [_pair(line) for line in lines.split(b"\r\n") if line]
        # A body that was not read to its end would be taken for the next request.
        if self._predict.draining() or not whole:
            headers.append((b"connection", b"close"))
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _wait(self, exchange: "_Awaited", receive: Receive) -> Answer:
        """Wait for the answer for as long as the client does. Raises `ClientGone` when it has closed the connection."""
        watch: asyncio.Task[None] | None = None

        def begin() -> None:
            nonlocal watch
            watch = asyncio.create_task(closed(receive), name="closed")
            watch.add_done_callback(leave)

        def leave(_: asyncio.Task[None]) -> None:
            if not exchange.answer.done():
                exchange.answer.set_exception(ClientGone())
                self._predict.batcher.drop(exchange)

        timer = asyncio.get_running_loop().call_later(_PATIENCE_S, begin)
        try:
            return await exchange.answer
        finally:
            timer.cancel()
            if watch is not None:
                watch.cancel()


class _Awaited(Exchange):
    """A request whose answer a task waits for."""

    __slots__ = ("answer",)

    def __init__(self, predict: Predict, head: Head, body: bytes, began: float) -> None:
        super().__init__(predict, head, body, began)
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def reply(self, status: int, lines: bytes, body: bytes) -> None:
        """Give the answer to the task."""
        if not self.answer.done():
            self.answer.set_result((status, lines, body))

    def fail(self, error: Exception, /) -> None:
        """Raise the error in the task, for the server to answer."""
        if not self.answer.done():
            self.answer.set_exception(error)


def _pair(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b": ")
    return name, value
