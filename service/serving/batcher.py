"""The batcher: requests that wait for the model run through it together, all with one servable.

Greedy: what waits when the model is free is the next batch, up to the size that is best for this model, and a lone
request is never held back to wait for others. Called on the event loop only.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter

import numpy as np
import structlog

from emaswap import BadVersion, Reason
from service.refusal import Code, Refusal
from service.serving.failure import Failure
from service.serving.forward import Forward, Ran, count
from service.serving.metrics import ServingMetrics
from service.serving.pace import Pace
from service.serving.request import Request
from service.serving.servable import Rows, Servable
from service.serving.slot import Slot

log = structlog.get_logger("emaswap.service")

_asker = attrgetter("asker")


class Batcher:
    """Runs requests through whatever servable is live when their batch starts."""

    def __init__(
        self,
        slot: Slot[Servable],
        metrics: ServingMetrics,
        *,
        max_rows: int,
        max_waiting: int,
        max_waiting_bytes: int,
        forward_timeout_s: float,
        on_broken: Callable[[Servable, BadVersion], None],
        batching: bool = True,
    ) -> None:
        """At most `max_rows` rows run at once; at most `max_waiting` requests, of so many bytes together, wait.

        Without `batching` each request runs by itself, for models whose answers depend on the rest of the batch. A
        live version that turns out broken, or takes longer than `forward_timeout_s`, is withdrawn from the slot, and
        `on_broken` is told.
        """
        self._slot = slot
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._max_waiting_bytes = max_waiting_bytes
        self._on_broken = on_broken
        self._batching = batching
        self._pace = Pace(max_rows)
        self._forward = Forward(metrics, timeout_s=forward_timeout_s)
        self._waiting: deque[Request] = deque()
        self._waiting_bytes = 0
        self._running: asyncio.Task[None] | None = None
        self._in_batch = 0
        metrics.waiting = lambda: len(self._waiting)
        metrics.in_flight = lambda: len(self._waiting) + self._in_batch

    def submit(self, request: Request) -> None:
        """Queue a validated request; call `begin` after the last one. Raises `Refusal` when the queue is full."""
        if self._waiting and (
            len(self._waiting) >= self._max_waiting
            or self._waiting_bytes + request.size_bytes > self._max_waiting_bytes
        ):
            raise Refusal(
                Code.QUEUE_IS_FULL,
                f"{len(self._waiting)} requests of {self._waiting_bytes} bytes are waiting already; try again later",
            )
        self._waiting.append(request)
        self._waiting_bytes += request.size_bytes

    def drop(self, request: Request) -> None:
        """Free the place of a request whose answer nobody waits for any more."""
        request.gone = True
        if request in self._waiting:
            self._waiting.remove(request)
            self._waiting_bytes -= request.size_bytes

    def begin(self) -> None:
        """Run the next batch, unless one is running. Where that is quick, the answers are out when this returns."""
        while self._running is None and self._waiting:
            servable = self._slot.current
            batch = self._take(servable)
            if servable is None or not batch:
                continue
            rows = sum(request.rows for request in batch)
            self._metrics.begins(rows, time.perf_counter() - batch[0].began)
            try:
                inputs = _stack(batch)
                ran = self._forward.here(servable, inputs) if self._pace.is_quick(rows) else None
            except BadVersion as error:
                self._pace.forget()
                self._withdraw(servable, error)
                self._tell_broken(batch, error)
                continue
            except Exception as error:  # a fault of ours, which must not end the batches to come
                self._tell_failed(batch, error)
                continue
            if isinstance(ran, Failure) and self._excuse(servable, batch, ran):
                continue
            if not isinstance(ran, Ran) or self._forward.is_suspect(ran.outputs, self._slot):
                self._in_batch = len(batch)
                self._running = asyncio.create_task(self._aside(servable, batch, inputs, ran), name="batch")
                return
            self._note(rows, ran)
            self._answer(batch, ran.outputs, servable)
            if self._waiting:  # whoever else is on the event loop has a turn between two batches
                asyncio.get_running_loop().call_soon(self.begin)
                return

    def close(self) -> None:
        """End the thread. What still runs or waits is not answered."""
        if self._running is not None:
            self._running.cancel()
        self._forward.close()

    async def _aside(self, servable: Servable, batch: list[Request], inputs: Rows, ran: Ran | Failure | None) -> None:
        """Run a batch on a thread, or look into how it `ran` here; then the next one begins."""
        tell: Callable[[], None]
        try:
            if ran is None:
                ran = await self._forward.aside(servable, inputs, chunk=self._chunk())
            if isinstance(ran, Failure) and self._excuse(servable, batch, ran):
                tell = lambda: None  # noqa: E731
            elif isinstance(ran, Failure):
                results = await self._forward.explain(servable, [request.inputs for request in batch], ran)
                tell = lambda: self._tell_each(batch, results, servable)  # noqa: E731
            else:
                self._note(count(inputs), ran)
                outputs = ran.outputs
                if self._forward.is_suspect(outputs, self._slot):
                    await self._forward.compare(servable, inputs, outputs, self._slot)
                tell = lambda: self._answer(batch, outputs, servable)  # noqa: E731
        except BadVersion as error:
            broken = error
            self._withdraw(servable, error)
            tell = lambda: self._tell_broken(batch, broken)  # noqa: E731
        except Exception as error:  # a fault of ours, which must not end the batches to come
            fault = error
            tell = lambda: self._tell_failed(batch, fault)  # noqa: E731
        finally:
            self._running = None
            self._in_batch = 0
        self.begin()  # first, so that the model works while answers are written
        tell()
        self.begin()

    def _excuse(self, servable: Servable, batch: Sequence[Request], failure: Failure) -> bool:
        """Refuse a lone request whose client has just sent another such; return whether that was possible."""
        request = batch[0]
        refusal = self._forward.excuse(servable, request.inputs, failure) if request.suspect else None
        if refusal is not None:
            request.asker.refused(request, refusal)
        return refusal is not None

    def _withdraw(self, servable: Servable, error: BadVersion) -> None:
        self._slot.withdraw(servable)
        log.error("version broken", version=servable.version, reason=str(error.reason), detail=error.detail)
        try:
            self._on_broken(servable, error)
        except Exception:  # a fault of ours, which must not end the batches to come
            log.exception("giving a version up failed", version=servable.version)

    def _note(self, rows: int, ran: Ran) -> None:
        self._pace.note(rows, ran.seconds)
        self._metrics.computed(ran.seconds)

    def _chunk(self) -> int | None:
        return self._pace.limit if self._batching else None

    def _answer(self, batch: list[Request], outputs: Rows, servable: Servable) -> None:
        groups = [(asker, list(requests)) for asker, requests in groupby(batch, _asker)]
        if len(groups) == 1:
            batch[0].asker.answered(batch, outputs, servable)
            return
        first = 0
        for asker, requests in groups:
            end = first + sum(request.rows for request in requests)
            asker.answered(requests, {name: output[first:end] for name, output in outputs.items()}, servable)
            first = end

    def _tell_each(self, batch: Sequence[Request], results: list[Rows | Refusal], servable: Servable) -> None:
        for request, result in zip(batch, results, strict=True):
            if isinstance(result, Refusal):
                request.asker.refused(request, result)
            else:
                request.asker.answered([request], result, servable)

    def _tell_broken(self, batch: Sequence[Request], error: BadVersion) -> None:
        for request in batch:
            if error.reason is Reason.FORWARD_TIMEOUT:
                request.asker.refused(request, _timed_out(error))
            elif len(batch) == 1 and error.reason is not Reason.ANSWERS_NOT_FINITE:
                request.asker.refused(request, _broke(error))
            else:
                request.asker.superseded(request, broken=True)

    def _tell_failed(self, batch: Sequence[Request], error: Exception) -> None:
        for request in batch:
            request.asker.failed(request, error)

    def _take(self, servable: Servable | None) -> list[Request]:
        """Return the requests of the next batch, oldest first. Those that do not fit into it keep their places.

        Tells those that are too late, or were validated for another version.
        """
        batch: list[Request] = []
        left: list[Request] = []
        stale: list[Request] = []
        late: list[Request] = []
        rows, limit = 0, self._pace.limit
        waiting = self._waiting
        while waiting and rows < limit:
            request = waiting.popleft()
            self._waiting_bytes -= request.size_bytes
            if servable is None or (
                request.signature is not servable.signature and request.signature != servable.signature
            ):
                stale.append(request)
            elif request.deadline is not None and time.perf_counter() > request.deadline:
                late.append(request)
            elif batch and not (self._batching and _fits(request, batch[0], limit - rows)):
                left.append(request)
            else:
                batch.append(request)
                rows += request.rows
        waiting.extendleft(reversed(left))
        self._waiting_bytes += sum(request.size_bytes for request in left)
        for request in late:
            request.asker.refused(
                request,
                Refusal(Code.DEADLINE_EXCEEDED, "the time that the request gave had passed before its turn came"),
            )
        for request in stale:
            request.asker.superseded(request, broken=False)
        return batch


def _fits(request: Request, first: Request, room: int) -> bool:
    """Return whether a request can run in the batch of another that has room for so many rows."""
    return not (request.alone or first.alone) and request.rows <= room and request.shapes == first.shapes


def _stack(batch: list[Request]) -> Rows:
    """Return the inputs of all requests as one batch."""
    if len(batch) == 1:
        return batch[0].inputs
    return {name: np.concatenate([request.inputs[name] for request in batch]) for name in batch[0].inputs}


def _broke(error: BadVersion) -> Refusal:
    """Return the refusal of a request that broke a version by itself: it might break the next one, too."""
    return Refusal(Code.VERSION_CHANGED, f"{error.detail}; this version is given up, and the request with it")


def _timed_out(error: BadVersion) -> Refusal:
    return Refusal(Code.FORWARD_TIMEOUT, f"{error.detail}; this version is given up, try again for another one")
