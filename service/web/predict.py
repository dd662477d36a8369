"""Predictions: from the bodies of requests to the bodies of answers, by way of the batcher.

What arrives in one turn of the event loop is parsed, run, encoded and answered together. How the bytes come in and go
out is not known here: that is the connection's, which makes an `Exchange` of each request.
"""

import asyncio
import contextlib
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

import structlog

from emaswap import Signature
from service.control.standing import Standing
from service.logs import Seldom
from service.parts import Answering
from service.refusal import Code, Refusal
from service.serving.forward import count
from service.serving.request import Asker, Request
from service.serving.servable import Rows, Servable
from service.settings import ServiceSettings
from service.web import refused
from service.web.dialect import Parsed
from service.web.head import JSON, Head, Rules
from service.web.json_rows import LARGE_BYTES, Envelope, parse_together
from service.web.token import Token

log = structlog.get_logger("emaswap.service")

Result = TypeVar("Result")

Answer = tuple[bytes, bytes]
"""The headers of an answer besides the length, as lines of HTTP, and its body."""

# Versions that may be replaced under one request before it is told to come again.
_ATTEMPTS = 3


class Exchange(Request):
    """One request of a client's, and the way back to it."""

    __slots__ = ("asked", "attempts", "body", "head")

    def __init__(self, predict: "Predict", head: Head, body: bytes, began: float) -> None:
        super().__init__(predict, began, None if head.timeout_s is None else began + head.timeout_s)
        self.head = head
        self.body = body
        self.attempts = 1
        self.asked: object = None

    @abstractmethod
    def reply(self, status: int, lines: bytes, body: bytes) -> None:
        """Send the answer: its status, its headers besides the length as lines that end with CRLF, and its body."""

    def blame(self) -> None:
        """Note that the model could not take this request. What the same client sends next may be alike."""

    @abstractmethod
    def fail(self, error: Exception, /) -> None:
        """Send the answer to a request that met a fault of ours."""


class Predict(Asker):
    """Answers requests for predictions. Every answer is made by one servable, and names it."""

    def __init__(
        self,
        answering: Answering,
        settings: ServiceSettings,
        *,
        standing: Callable[[], Standing],
        draining: Callable[[], bool],
        token: Token | None = None,
    ) -> None:
        """`standing` says how things stand; `draining` whether connections should go elsewhere.

        With a `token`, only requests that carry it are answered.
        """
        self.settings = settings
        self.rules = Rules(settings.max_body_bytes, token)
        self.draining = draining
        self.batcher = answering.batcher
        self._slot = answering.slot
        self._metrics = answering.metrics
        self._standing = standing
        self._arrived: list[Exchange] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._envelope: Envelope | None = None
        self._seldom = Seldom()
        # One thread: what is parsed at once, and so the memory for it, is one body.
        self._thread = ThreadPoolExecutor(1, "emaswap-parse")

    def close(self) -> None:
        """End the thread. What still waits for it is not answered."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def arrive(self, exchange: Exchange) -> None:
        """Take a request whose body is whole. What else arrives in this turn of the event loop joins it."""
        if not self._arrived:
            asyncio.get_running_loop().call_soon(self._turn)
        self._arrived.append(exchange)

    def refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        """Answer a request with a refusal."""
        self._metrics.refused(refusal.code)
        body = exchange.head.dialect.refuse(refusal)
        self._send(exchange, refused.STATUS[refusal.code], refused.lines(refusal), body)

    # -- the batcher's word ------------------------------------------------------------------------------------------

    def answered(self, requests: Sequence[Request], outputs: Rows, servable: Servable) -> None:
        """Encode the outputs, and send each request its own."""
        exchanges = cast("Sequence[Exchange]", requests)
        if sum(output.nbytes for output in outputs.values()) > LARGE_BYTES:
            self._spawn(self._encode_aside(exchanges, outputs, servable))
            return
        try:
            answers = self._encode(exchanges, outputs, servable)
        except Exception as error:
            self._give_up(exchanges, error)
        else:
            self._answer(exchanges, answers, servable)

    def refused(self, request: Request, refusal: Refusal) -> None:
        """Send the refusal."""
        exchange = cast("Exchange", request)
        if refusal.code is Code.MODEL_REFUSED:
            exchange.blame()
        self.refuse(exchange, refusal)

    def superseded(self, request: Request, *, broken: bool) -> None:
        """Validate the request anew, for the version that is live by now."""
        exchange = cast("Exchange", request)
        exchange.alone = exchange.alone or broken
        exchange.attempts += 1
        if exchange.attempts > _ATTEMPTS:
            detail = f"the live version was replaced {_ATTEMPTS} times while this request waited"
            self.refuse(exchange, Refusal(Code.VERSION_CHANGED, detail))
        else:
            self.arrive(exchange)

    def failed(self, request: Request, error: Exception) -> None:
        """Answer 500, where the alert on errors sees it."""
        exchange = cast("Exchange", request)
        log.error("answering failed", error=f"{type(error).__name__}: {error}")
        self._metrics.answered(500, time.perf_counter() - exchange.began)
        exchange.fail(error)

    # -- a turn ------------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Parse what has arrived, and let the batcher begin."""
        arrived, self._arrived = self._arrived, []
        servable = self._slot.current
        ready: list[Exchange] = []
        for exchange in arrived:
            if exchange.gone:
                continue
            if (refusal := exchange.head.refusal or self._not_by(servable, exchange.head)) is not None:
                self.refuse(exchange, refusal)
            elif len(exchange.body) > LARGE_BYTES:
                assert servable is not None
                self._spawn(self._parse_aside(exchange, servable))
            else:
                ready.append(exchange)
        if servable is not None and ready:
            self._parse(ready, servable)
        self.batcher.begin()

    def _parse(self, exchanges: list[Exchange], servable: Servable) -> None:
        """Parse small bodies, together where they are JSON and all right, and submit what fits."""
        signature = servable.signature
        together = None
        if all(exchange.head.dialect is JSON for exchange in exchanges):
            with contextlib.suppress(MemoryError):
                bodies = [exchange.body for exchange in exchanges]
                together = parse_together(bodies, signature, self.settings.max_batch_rows)
        if together is not None:
            for exchange, (inputs, rows) in zip(exchanges, together, strict=True):
                exchange.validated(inputs, rows, signature)
                self._submit(exchange)
            return
        for exchange in exchanges:
            try:
                self._take(exchange, self._parse_one(exchange, servable), signature)
            except Exception as error:
                self._give_up([exchange], error)

    async def _parse_aside(self, exchange: Exchange, servable: Servable) -> None:
        """Parse a large body on a thread."""
        try:
            parsed = await self._on_thread(lambda: self._parse_one(exchange, servable))
            self._take(exchange, parsed, servable.signature)
        except Exception as error:
            self._give_up([exchange], error)
        self.batcher.begin()

    def _parse_one(self, exchange: Exchange, servable: Servable) -> Parsed:
        return exchange.head.dialect.parse(exchange.body, servable, self.settings.max_batch_rows)

    def _take(self, exchange: Exchange, parsed: Parsed, signature: Signature) -> None:
        exchange.asked = parsed.asked
        exchange.validated(parsed.inputs, count(parsed.inputs), signature)
        self._submit(exchange)

    async def _encode_aside(self, exchanges: Sequence[Exchange], outputs: Rows, servable: Servable) -> None:
        """Encode large outputs on a thread."""
        try:
            answers = await self._on_thread(lambda: self._encode(exchanges, outputs, servable))
        except Exception as error:
            self._give_up(exchanges, error)
        else:
            self._answer(exchanges, answers, servable)

    def _encode(self, exchanges: Sequence[Exchange], outputs: Rows, servable: Servable) -> list[Answer | Refusal]:
        """Return the headers and the body of each request's answer."""
        if all(exchange.head.answer is JSON for exchange in exchanges):
            envelope = self._envelope_of(servable)
            return [(envelope.lines, body) for body in envelope.bodies(outputs, [each.rows for each in exchanges])]
        first = 0
        answers: list[Answer | Refusal] = []
        for exchange in exchanges:
            own = {name: output[first : first + exchange.rows] for name, output in outputs.items()}
            try:
                answers.append(exchange.head.answer.encode(own, servable, exchange.asked))
            except Refusal as refusal:
                answers.append(refusal)
            first += exchange.rows
        return answers

    def _give_up(self, exchanges: Sequence[Exchange], error: Exception) -> None:
        """Refuse requests, or note that the fault is ours."""
        for exchange in exchanges:
            if isinstance(error, MemoryError):
                self.refuse(exchange, self._short_of_memory())
            elif isinstance(error, Refusal):
                self.refuse(exchange, error)
            else:
                self.failed(exchange, error)

    def _submit(self, exchange: Exchange) -> None:
        if exchange.gone:
            return
        try:
            self.batcher.submit(exchange)
        except Refusal as refusal:
            self.refuse(exchange, refusal)

    # -- answers -----------------------------------------------------------------------------------------------------

    def _answer(self, exchanges: Sequence[Exchange], answers: Sequence[Answer | Refusal], servable: Servable) -> None:
        for exchange, answer in zip(exchanges, answers, strict=True):
            if exchange.head.min_version > servable.version:  # rolled back while the request waited
                self.refuse(exchange, self._too_old(servable, exchange.head))
            elif isinstance(answer, Refusal):
                self.refuse(exchange, answer)
            else:
                self._send(exchange, 200, *answer)

    def _send(self, exchange: Exchange, status: int, lines: bytes, body: bytes) -> None:
        self._metrics.answered(status, time.perf_counter() - exchange.began)
        if not exchange.gone:
            exchange.reply(status, lines, body)

    def _envelope_of(self, servable: Servable) -> Envelope:
        if self._envelope is None or not self._envelope.is_for(servable):
            self._envelope = Envelope(servable)
        return self._envelope

    def _not_by(self, servable: Servable | None, head: Head) -> Refusal | None:
        """Return why what is live cannot answer such a request, `None` where it can."""
        if servable is None:
            return refused.no_live_version(self._standing().status)
        return self._too_old(servable, head) if servable.version < head.min_version else None

    def _too_old(self, servable: Servable, head: Head) -> Refusal:
        return refused.TooOld(servable, head.min_version, self._standing().pin)

    def _short_of_memory(self) -> Refusal:
        if (skipped := self._seldom.skipped()) is not None:
            log.warning("memory ran out outside of the model", lines_left_out=skipped)
        return Refusal(Code.OUT_OF_MEMORY, "memory ran out; try again later, or send fewer rows")

    async def _on_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _spawn(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
