"""The batcher: requests that wait for the model run through it together, all with one servable.

While a batch runs, what arrives waits; when it ends, all that waits and fits together is the next batch. A lone
request is never held back to wait for others. Called on the event loop only; the model runs on a thread of its own.
"""

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from emaswap import Signature
from service.refusal import Code, Refusal
from service.serving.metrics import ServingMetrics
from service.serving.servable import Rows, Servable
from service.serving.slot import Slot


@dataclass(frozen=True)
class Answer:
    """A request's outputs, and the servable that made them."""

    outputs: Rows
    servable: Servable


class SignatureChanged(Exception):
    """A version with another signature went live after the request was validated: validate it again."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    inputs: Rows
    signature: Signature
    answer: "asyncio.Future[Answer]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def rows(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def size_bytes(self) -> int:
        return sum(array.nbytes for array in self.inputs.values())

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of a row: only rows of one size can be stacked."""
        return [array.shape[1:] for array in self.inputs.values()]


class Batcher:
    """Runs requests through whatever servable is live when their batch starts."""

    def __init__(
        self, slot: Slot, metrics: ServingMetrics, *, max_rows: int, max_waiting: int, max_waiting_bytes: int
    ) -> None:
        """At most `max_rows` rows run at once; at most `max_waiting` requests, of so many bytes together, wait."""
        self.slot = slot
        self.metrics = metrics
        self.max_rows = max_rows
        self.max_waiting = max_waiting
        self.max_waiting_bytes = max_waiting_bytes
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._running = False
        self._executor = ThreadPoolExecutor(1, "emaswap-forward")
        metrics.waiting.set_function(lambda: len(self._waiting))

    async def predict(self, inputs: Rows, signature: Signature) -> Answer:
        """The answer to inputs that fit a signature.

        Raises `Refusal` when the queue is full or the model refuses the inputs, `SignatureChanged` when they have to
        be validated again.
        """
        waiting = _Waiting(inputs, signature)
        if self._waiting and (
            len(self._waiting) >= self.max_waiting or self._waiting_bytes + waiting.size_bytes > self.max_waiting_bytes
        ):
            raise Refusal(
                Code.QUEUE_IS_FULL,
                f"{len(self._waiting)} requests of {self._waiting_bytes} bytes are waiting already; try again later",
            )
        self._waiting.append(waiting)
        self._waiting_bytes += waiting.size_bytes
        if not self._running:
            self._start_batch()
        return await waiting.answer

    def close(self) -> None:
        """End the thread, once the batch it is at is done."""
        self._executor.shutdown(wait=True)

    def _start_batch(self) -> None:
        servable = self.slot.current
        batch = self._take(servable.signature) if servable else []
        if servable is None or not batch:
            self._running = False
            return
        self._running = True
        self.metrics.batch_rows.observe(sum(waiting.rows for waiting in batch))
        done = asyncio.get_running_loop().run_in_executor(
            self._executor, _run, servable, [waiting.inputs for waiting in batch]
        )
        done.add_done_callback(lambda done: self._finish(batch, servable, done))

    def _finish(self, batch: list[_Waiting], servable: Servable, done: "asyncio.Future[list[Rows | Refusal]]") -> None:
        failure = done.exception()
        for waiting, result in zip(batch, [failure] * len(batch) if failure else done.result(), strict=True):
            if waiting.answer.done():
                continue  # the client has gone
            if isinstance(result, BaseException):
                waiting.answer.set_exception(result)
            else:
                waiting.answer.set_result(Answer(result, servable))
        self._start_batch()

    def _take(self, signature: Signature) -> list[_Waiting]:
        """The requests of the next batch, oldest first; those that do not fit into it keep their places."""
        batch: list[_Waiting] = []
        left: deque[_Waiting] = deque()
        rows = 0
        while self._waiting:
            waiting = self._waiting.popleft()
            if waiting.answer.done():
                continue
            if waiting.signature is not signature and waiting.signature != signature:
                waiting.answer.set_exception(SignatureChanged())
            elif batch and (rows + waiting.rows > self.max_rows or waiting.shapes != batch[0].shapes):
                left.append(waiting)
            else:
                batch.append(waiting)
                rows += waiting.rows
        self._waiting = left
        self._waiting_bytes = sum(waiting.size_bytes for waiting in left)
        return batch


def _run(servable: Servable, requests: list[Rows]) -> list[Rows | Refusal]:
    """Outputs or a refusal for each request. One whose values the model cannot take must not fail its neighbours."""
    try:
        inputs = {name: np.concatenate([request[name] for request in requests]) for name in requests[0]}
        outputs = servable.run(inputs)
    except Exception as error:  # forward is somebody else's code and may raise anything
        if len(requests) > 1:
            return [result for request in requests for result in _run(servable, [request])]
        return [Refusal(Code.MODEL_REFUSED, f"the model cannot take these inputs: {type(error).__name__}: {error}")]
    ends = np.cumsum([len(next(iter(request.values()))) for request in requests])[:-1]
    parts = {name: np.split(output, ends) for name, output in outputs.items()}
    return [{name: parts[name][index] for name in outputs} for index in range(len(requests))]
