"""The batcher: requests that wait for the model run through it together, all with one servable.

While a batch runs, new requests wait; when it ends, all that wait and fit together are the next batch. A lone request
is never held back to wait for others. Called on the event loop only.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from emaswap import BadVersion, Reason, Signature
from service.refusal import Code, Refusal
from service.serving.forward import Forward, count
from service.serving.metrics import ServingMetrics
from service.serving.servable import Rows, Servable
from service.serving.slot import Slot

log = structlog.get_logger("emaswap.service")


@dataclass(frozen=True)
class Answer:
    """A request's outputs, and the servable that made them."""

    outputs: Rows
    servable: Servable


class Superseded(Exception):
    """The version that the request was validated for is not live any more: validate it for the one that is."""

    def __init__(self, *, broken: bool) -> None:
        super().__init__("broken" if broken else "replaced")
        self.broken = broken


@dataclass(frozen=True, eq=False)
class _Waiting:
    inputs: Rows
    signature: Signature
    alone: bool
    answer: "asyncio.Future[Answer]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def rows(self) -> int:
        return count(self.inputs)

    @property
    def size_bytes(self) -> int:
        return sum(array.nbytes for array in self.inputs.values())

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of a row: only rows of one size can be stacked."""
        return [array.shape[1:] for array in self.inputs.values()]

    def fail(self, error: Exception) -> None:
        """Raise an error for whoever awaits the answer, if anybody still does."""
        if not self.answer.done():
            self.answer.set_exception(error)


class Batcher:
    """Runs requests through whatever servable is live when their batch starts."""

    def __init__(
        self,
        slot: Slot,
        metrics: ServingMetrics,
        *,
        max_rows: int,
        max_waiting: int,
        max_waiting_bytes: int,
        forward_timeout_s: float,
        on_broken: Callable[[Servable, BadVersion], None],
    ) -> None:
        """At most `max_rows` rows run at once; at most `max_waiting` requests, of so many bytes together, wait.

        A live version that turns out broken, or takes longer than `forward_timeout_s`, is withdrawn from the slot, and
        `on_broken` is told.
        """
        self._slot = slot
        self._metrics = metrics
        self._limits = _Limits(max_rows, max_waiting, max_waiting_bytes)
        self._on_broken = on_broken
        self._forward = Forward(metrics, timeout_s=forward_timeout_s)
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._running: asyncio.Task[None] | None = None
        metrics.waiting.set_function(lambda: len(self._waiting))

    def submit(self, inputs: Rows, signature: Signature, *, alone: bool = False) -> "asyncio.Future[Answer]":
        """Return the future answer to inputs that fit a signature. Raises `Refusal` when the queue is full.

        The future raises `Refusal` when there is no answer to these inputs, and `Superseded` when they have to be
        validated again. If that is because a version broke under their batch, submit them `alone`: one of the batch
        may break the next version, too.
        """
        waiting = _Waiting(inputs, signature, alone)
        if self._waiting and (
            len(self._waiting) >= self._limits.requests
            or self._waiting_bytes + waiting.size_bytes > self._limits.size_bytes
        ):
            raise Refusal(
                Code.QUEUE_IS_FULL,
                f"{len(self._waiting)} requests of {self._waiting_bytes} bytes are waiting already; try again later",
            )
        self._waiting.append(waiting)
        self._waiting_bytes += waiting.size_bytes
        if self._running is None:
            self._running = asyncio.create_task(self._run(), name="batcher")
        return waiting.answer

    def drop(self, answer: "asyncio.Future[Answer]") -> None:
        """Free the place of a request whose answer nobody waits for any more."""
        for waiting in self._waiting:
            if waiting.answer is answer:
                self._waiting.remove(waiting)
                self._waiting_bytes -= waiting.size_bytes
                return

    def close(self) -> None:
        """End the thread. What still runs or waits is not answered."""
        if self._running is not None:
            self._running.cancel()
        self._forward.close()

    async def _run(self) -> None:
        """Run batch after batch until nothing waits."""
        try:
            while self._waiting:
                servable = self._slot.current
                batch = self._take(servable)
                if servable is not None and batch:
                    await self._answer(servable, batch)
        finally:
            self._running = None

    async def _answer(self, servable: Servable, batch: list[_Waiting]) -> None:
        self._metrics.batch_rows.observe(sum(waiting.rows for waiting in batch))
        results: list[Rows | Refusal]
        try:
            results = await self._forward.run(servable, [waiting.inputs for waiting in batch])
        except BadVersion as error:
            self._slot.withdraw(servable)
            for waiting in batch:
                waiting.fail(_timed_out(error) if error.reason is Reason.FORWARD_TIMEOUT else Superseded(broken=True))
            log.error("version broken", version=servable.version, reason=str(error.reason), detail=error.detail)
            self._on_broken(servable, error)
            return
        except Exception as error:  # a fault of ours, which must not end the batches to come
            for waiting in batch:
                waiting.fail(error)
            return
        for waiting, result in zip(batch, results, strict=True):
            if isinstance(result, Refusal):
                waiting.fail(result)
            elif not waiting.answer.done():
                waiting.answer.set_result(Answer(result, servable))

    def _take(self, servable: Servable | None) -> list[_Waiting]:
        """Return the requests of the next batch, oldest first. Those that do not fit into it keep their places."""
        batch: list[_Waiting] = []
        left: deque[_Waiting] = deque()
        rows = 0
        while self._waiting:
            waiting = self._waiting.popleft()
            if waiting.answer.done():
                continue
            if servable is None or (
                waiting.signature is not servable.signature and waiting.signature != servable.signature
            ):
                waiting.fail(Superseded(broken=False))
            elif batch and not self._fits(waiting, batch[0], rows):
                left.append(waiting)
            else:
                batch.append(waiting)
                rows += waiting.rows
        self._waiting = left
        self._waiting_bytes = sum(waiting.size_bytes for waiting in left)
        return batch

    def _fits(self, waiting: _Waiting, first: _Waiting, rows: int) -> bool:
        """Return whether a request can run in the batch of another that has so many rows already."""
        return (
            not (waiting.alone or first.alone)
            and rows + waiting.rows <= self._limits.rows
            and waiting.shapes == first.shapes
        )


@dataclass(frozen=True)
class _Limits:
    """Rows of a batch; requests that may wait, and their bytes."""

    rows: int
    requests: int
    size_bytes: int


def _timed_out(error: BadVersion) -> Refusal:
    return Refusal(Code.FORWARD_TIMEOUT, f"{error.detail}; this version is given up, try again for another one")
