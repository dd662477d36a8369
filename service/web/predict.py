"""POST /predict, the hot path: an ASGI endpoint of its own, which FastAPI routes to and documents.

Going through FastAPI's parameters and response models would cost more than everything else on a small model.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.types import Receive, Scope, Send

from emaswap import Signature
from service.refusal import Code, Refusal
from service.serving.batcher import Answer, Batcher, SignatureChanged
from service.serving.metrics import ServingMetrics
from service.serving.servable import Servable
from service.serving.slot import Slot
from service.settings import ServiceSettings
from service.web import refused
from service.web.json_rows import parse

# Larger bodies are parsed on a thread, so that they do not hold up everybody else.
_PARSE_INLINE_BYTES = 64 << 10


class _ClientGone(Exception):
    """The client closed the connection before its request was whole."""


class Predict:
    """The endpoint. Every answer is made by one servable, and names it."""

    def __init__(
        self,
        slot: Slot,
        batcher: Batcher,
        metrics: ServingMetrics,
        settings: ServiceSettings,
        *,
        status: Callable[[], str],
        draining: Callable[[], bool],
    ) -> None:
        """`status` says why no version is live yet; `draining` whether connections should go elsewhere."""
        self.slot = slot
        self.batcher = batcher
        self.metrics = metrics
        self.settings = settings
        self.status = status
        self.draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        try:
            answer = await self._answer(headers, receive)
            status, body = 200, encode(answer)
            named = refused.identity(answer.servable)
        except Refusal as refusal:
            status, body = refused.STATUS[refusal.code], refused.body(refusal)
            named = refused.headers(refusal)
        except _ClientGone:
            return
        except Exception:
            # It is a fault of ours, which the server answers with 500; the alert on errors must see it.
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
        body = await self._read(headers, receive)
        while True:
            servable = self._live(wanted)
            inputs = await self._parse(body, servable.signature)
            try:
                answer = await self.batcher.predict(inputs, servable.signature)
            except SignatureChanged:
                continue
            if wanted and answer.servable.version < wanted:  # rolled back while the request waited
                raise refused.TooOld(answer.servable, wanted)
            return answer

    def _live(self, wanted: int) -> Servable:
        servable = self.slot.current
        if servable is None:
            raise refused.no_live_version(self.status())
        if servable.version < wanted:
            raise refused.TooOld(servable, wanted)
        return servable

    async def _parse(self, body: bytes, signature: Signature) -> dict[str, NDArray[np.generic]]:
        if len(body) <= _PARSE_INLINE_BYTES:
            return parse(body, signature, self.settings.max_batch_rows)
        return await asyncio.to_thread(parse, body, signature, self.settings.max_batch_rows)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The body, if it is neither too large nor too slow."""
        limit = self.settings.max_body_bytes
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            raise Refusal(Code.BODY_TOO_LARGE, f"expected at most {limit} bytes, got {int(length)}")
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGone
                    parts.append(message["body"])
                    size += len(message["body"])
                    if size > limit:
                        raise Refusal(Code.BODY_TOO_LARGE, f"expected at most {limit} bytes, got more")
                    more = message.get("more_body", False)
        except TimeoutError:
            raise Refusal(
                Code.BODY_TIMEOUT, f"the body did not end within {self.settings.body_timeout_s:g} s"
            ) from None
        return b"".join(parts)


def encode(answer: Answer) -> bytes:
    """The body of an answer: outputs, predictions where the signature has labels, and which version made them."""
    servable = answer.servable
    outputs = answer.outputs
    body: dict[str, Any] = {"outputs": outputs if len(outputs) > 1 else next(iter(outputs.values()))}
    if servable.signature.labels is not None:
        body["predictions"] = _predictions(next(iter(outputs.values())), servable.signature.labels)
    body["model"] = {
        "name": servable.manifest.model,
        "version": servable.version,
        "step": servable.manifest.training.step,
        "digest": servable.digest,
    }
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _predictions(logits: NDArray[Any], labels: tuple[str, ...]) -> list[dict[str, object]]:
    """The likeliest label of each row, and its softmax probability."""
    if logits.shape[1] != len(labels):
        raise Refusal(Code.MODEL_REFUSED, f"the model gave {logits.shape[1]} outputs a row for {len(labels)} labels")
    best = logits.argmax(axis=1)
    with np.errstate(invalid="ignore"):
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = (shifted / shifted.sum(axis=1, keepdims=True))[np.arange(len(best)), best]
    return [{"label": labels[index], "score": score} for index, score in zip(best.tolist(), scores, strict=True)]


def _min_version(headers: dict[bytes, bytes]) -> int:
    text = headers.get(b"x-min-model-version", b"0")
    if not text.isdigit() or len(text) > 15:
        raise Refusal(Code.INVALID_HEADER, f"X-Min-Model-Version: expected a version number, got {text[:40]!r}")
    return int(text)
