"""POST /predict, the hot path: an ASGI endpoint of its own, which FastAPI routes to and documents.

Going through FastAPI's parameters and response models would cost more than everything else on a small model.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

import structlog
from starlette.types import Receive, Scope, Send

from emaswap import Signature
from service.control.standing import Standing
from service.logs import Seldom
from service.refusal import Code, Refusal
from service.serving.batcher import Answer, Batcher, Superseded
from service.serving.metrics import ServingMetrics
from service.serving.servable import Rows, Servable
from service.serving.slot import Slot
from service.settings import ServiceSettings
from service.web import refused
from service.web.body import ClientGone, closed, read
from service.web.json_rows import encode, parse

log = structlog.get_logger("emaswap.service")

Result = TypeVar("Result")

# What is larger is parsed and encoded on a thread.
_INLINE_BYTES = 64 << 10
# Only clients that wait longer are watched for leaving: most have their answer by then.
_PATIENCE_S = 0.02
# Versions that may be replaced under one request before it is told to come again.
_ATTEMPTS = 3


class Predict:
    """The endpoint. Every answer is made by one servable, and names it."""

    def __init__(
        self,
        slot: Slot,
        batcher: Batcher,
        metrics: ServingMetrics,
        settings: ServiceSettings,
        *,
        standing: Callable[[], Standing],
        draining: Callable[[], bool],
    ) -> None:
        """`standing` says how things stand; `draining` whether connections should go elsewhere."""
        self.slot = slot
        self.batcher = batcher
        self.metrics = metrics
        self.settings = settings
        self.standing = standing
        self.draining = draining
        self._seldom = Seldom()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        try:
            answer = await self._answer(headers, receive)
            size = sum(output.nbytes for output in answer.outputs.values())
            status, body = 200, await _aside(size, lambda: encode(answer))
            named = refused.identity(answer.servable)
        except ClientGone:
            return
        except (Refusal, MemoryError) as error:
            refusal = error if isinstance(error, Refusal) else self._short_of_memory()
            status, body = refused.STATUS[refusal.code], refused.body(refusal)
            named = refused.headers(refusal)
        except Exception:
            # A fault of ours, which the server answers with 500. The alert on errors must see it.
            self.metrics.answered(500, time.perf_counter() - began)
            raise
        # A body that was not read to its end would be taken for the next request.
        if self.draining() or status in (408, 413):
            named["Connection"] = "close"
        start = {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                *((name.lower().encode(), value.encode()) for name, value in named.items()),
            ],
        }
        await send(start)
        await send({"type": "http.response.body", "body": body})
        self.metrics.answered(status, time.perf_counter() - began)

    async def _answer(self, headers: dict[bytes, bytes], receive: Receive) -> Answer:
        wanted = _min_version(headers)
        kind = headers.get(b"content-type", b"application/json").partition(b";")[0].strip().lower()
        if kind != b"application/json" or headers.get(b"content-encoding", b"identity") != b"identity":
            came = b" ".join(headers[name] for name in (b"content-type", b"content-encoding") if name in headers)
            raise Refusal(
                Code.UNSUPPORTED_MEDIA_TYPE, f"expected plain application/json, got {came.decode('latin-1')!r}"
            )
        body = await read(
            receive,
            headers.get(b"content-length", b""),
            max_bytes=self.settings.max_body_bytes,
            timeout_s=self.settings.body_timeout_s,
        )
        alone = False
        for _ in range(_ATTEMPTS):
            servable = self._live(wanted)
            inputs = await self._parse(body, servable.signature)
            try:
                answer = await self._wait(self.batcher.submit(inputs, servable.signature, alone=alone), receive)
            except Superseded as error:
                alone = alone or error.broken
                continue
            if wanted and answer.servable.version < wanted:  # rolled back while the request waited
                raise refused.TooOld(answer.servable, wanted, self.standing().pin)
            return answer
        raise Refusal(
            Code.VERSION_CHANGED, f"the live version was replaced {_ATTEMPTS} times while this request waited"
        )

    async def _wait(self, answer: "asyncio.Future[Answer]", receive: Receive) -> Answer:
        """Wait for the answer for as long as the client does. Raises `ClientGone` when it has closed the connection."""
        watch: asyncio.Task[None] | None = None

        def begin() -> None:
            nonlocal watch
            watch = asyncio.create_task(closed(receive), name="closed")
            watch.add_done_callback(leave)

        def leave(_: asyncio.Task[None]) -> None:
            if not answer.done():
                answer.set_exception(ClientGone())
                self.batcher.drop(answer)

        timer = asyncio.get_running_loop().call_later(_PATIENCE_S, begin)
        try:
            return await answer
        finally:
            timer.cancel()
            if watch is not None:
                watch.cancel()

    def _live(self, wanted: int) -> Servable:
        servable = self.slot.current
        if servable is None:
            raise refused.no_live_version(self.standing().status)
        if servable.version < wanted:
            raise refused.TooOld(servable, wanted, self.standing().pin)
        return servable

    async def _parse(self, body: bytes, signature: Signature) -> Rows:
        return await _aside(len(body), lambda: parse(body, signature, self.settings.max_batch_rows))

    def _short_of_memory(self) -> Refusal:
        if (skipped := self._seldom.skipped()) is not None:
            log.warning("memory ran out outside of the model", lines_left_out=skipped)
        return Refusal(Code.OUT_OF_MEMORY, "memory ran out; try again later, or send fewer rows")


async def _aside(size_bytes: int, work: Callable[[], Result]) -> Result:
    """Do work of a size here where it is small, else on a thread, where it does not hold up everybody else."""
    return work() if size_bytes <= _INLINE_BYTES else await asyncio.to_thread(work)


def _min_version(headers: dict[bytes, bytes]) -> int:
    text = headers.get(b"x-min-model-version", b"0")
    if not text.isdigit() or len(text) > 15:
        raise Refusal(Code.INVALID_HEADER, f"X-Min-Model-Version: expected a version number, got {text[:40]!r}")
    return int(text)
