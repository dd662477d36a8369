"""Forward passes: requests run through a servable together, and when that fails, whose fault it was.

Memory that ran out is ours. Otherwise the requests of the batch run again, each alone, and the version's own probe
before and after: if the probe is answered as it was recorded, the requests that failed alone were at fault, and if not,
the version is broken. So a bad request costs each of its neighbours one further run, and a batch two proofs.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import structlog

from emaswap import BadVersion, Reason
from service.logs import Seldom
from service.refusal import Code, Refusal, shorten
from service.serving.failure import Cause, Failure
from service.serving.metrics import ServingMetrics
from service.serving.runner import Runner
from service.serving.servable import Rows, Servable

log = structlog.get_logger("emaswap.service")

Result = TypeVar("Result")

# How long the end of the service waits for a batch that is still running.
_LAST_BATCH_S = 1.0


class Forward:
    """Runs forward passes on a thread of its own, which it leaves behind when one hangs."""

    def __init__(self, metrics: ServingMetrics, *, timeout_s: float) -> None:
        """One forward pass may take `timeout_s` seconds."""
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._runner = Runner("emaswap-forward")
        self._seldom = {cause: Seldom() for cause in Cause}

    async def run(self, servable: Servable, requests: list[Rows]) -> list[Rows | Refusal]:
        """Return outputs or a refusal for each request; their rows can be stacked.

        Raises `BadVersion` when the version is broken, or hangs.
        """
        outputs = await self._attempt(servable, requests)
        if not isinstance(outputs, Failure):
            return list(outputs)
        if len(requests) == 1:
            return await self._blame(servable, requests, [outputs])
        if not outputs.memory:
            await self._prove(servable, outputs)  # what is broken would fail with each of them
        alone = [await self._attempt(servable, [request]) for request in requests]
        return await self._blame(servable, requests, [one if isinstance(one, Failure) else one[0] for one in alone])

    def close(self) -> None:
        """End the thread. A forward pass that does not end soon is left behind."""
        self._runner.end(wait_s=_LAST_BATCH_S)

    async def _blame(
        self, servable: Servable, requests: list[Rows], results: list[Rows | Failure]
    ) -> list[Rows | Refusal]:
        """Replace each failure of a request that ran alone by a refusal. Raises `BadVersion` if the version is at fault."""
        rows: dict[int, int | None] = {}
        short = suspect = None
        for index, result in enumerate(results):
            if isinstance(result, Failure) and not result.memory:
                rows[index] = await self._row_at_fault(servable, requests[index])
                suspect = result
        if suspect is not None:
            short = await self._prove(servable, suspect)
        return [
            self._refuse(servable, short or result, rows.get(index)) if isinstance(result, Failure) else result
            for index, result in enumerate(results)
        ]

    def _refuse(self, servable: Servable, failure: Failure, row: int | None) -> Refusal:
        """Return the refusal of a request that failed alone in a version that is not broken."""
        self._note(Cause.MEMORY if failure.memory else Cause.REQUEST, servable, failure)
        if failure.memory:
            detail = f"memory ran out; try again later, or send fewer rows: {failure.text}"
            return Refusal(Code.OUT_OF_MEMORY, detail)
        which = "" if row is None else f"row {row}: "
        return Refusal(Code.MODEL_REFUSED, f"{which}the model cannot take these inputs: {failure.text}")

    async def _prove(self, servable: Servable, suspect: Failure) -> Failure | None:
        """Raise `BadVersion` if the probe is not answered as recorded. Return a failure if memory is too short for it."""
        verdict = await self._within_time(servable, lambda: _verdict(servable))
        if isinstance(verdict, BadVersion):
            self._note(Cause.VERSION, servable, suspect)
            raise BadVersion(verdict.reason, shorten(f"{verdict.detail}; a request had failed: {suspect.text}"))
        return verdict

    async def _row_at_fault(self, servable: Servable, request: Rows) -> int | None:
        """Return the first row that fails alone, found by halving, or `None` if the rows fail only together."""
        first, end, seen = 0, count(request), True
        while end - first > 1 or not seen:
            middle = max(first + 1, (first + end) // 2)
            result = await self._attempt(servable, [{name: rows[first:middle] for name, rows in request.items()}])
            if isinstance(result, Failure):
                if result.memory:
                    return None
                end, seen = middle, True
            elif middle == end:
                return None
            else:
                first, seen = middle, False
        return first

    async def _attempt(self, servable: Servable, requests: list[Rows]) -> list[Rows] | Failure:
        return await self._within_time(servable, lambda: _outputs(servable, requests))

    async def _within_time(self, servable: Servable, job: Callable[[], Result]) -> Result:
        """Return what a job on the thread returns. Raises `BadVersion` when it takes too long."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._runner.run(job)
        except TimeoutError:
            self._runner.end()
            self._runner = Runner("emaswap-forward")
            failure = Failure(f"a forward pass did not end within {self._timeout_s:g} s", "", memory=False)
            self._note(Cause.TIMEOUT, servable, failure)
            raise BadVersion(Reason.FORWARD_TIMEOUT, failure.text) from None

    def _note(self, cause: Cause, servable: Servable, failure: Failure) -> None:
        self._metrics.forward_failures.labels(cause=cause).inc()
        if (skipped := self._seldom[cause].skipped()) is not None:
            log.warning(
                "forward pass failed",
                cause=str(cause),
                version=servable.version,
                error=failure.text,
                place=failure.place,
                lines_left_out=skipped,
            )


def count(rows: Rows) -> int:
    """Return how many rows there are."""
    return len(next(iter(rows.values())))


def _outputs(servable: Servable, requests: list[Rows]) -> list[Rows] | Failure:
    """Return the outputs of each request, or why there are none. Never raises."""
    try:
        inputs = {name: np.concatenate([request[name] for request in requests]) for name in requests[0]}
        outputs = servable.run(inputs)
        ends = np.cumsum([count(request) for request in requests])[:-1]
        parts = {name: np.split(output, ends) for name, output in outputs.items()}
        return [{name: parts[name][index] for name in outputs} for index in range(len(requests))]
    except BaseException as error:  # forward is somebody else's code and may raise anything
        return Failure.of(error)


def _verdict(servable: Servable) -> BadVersion | Failure | None:
    """Return `None` if the probe is answered as recorded, else what is wrong with the version, or that memory ran out."""
    try:
        servable.prove()
    except BaseException as error:  # forward is somebody else's code and may raise anything
        failure = Failure.of(error)
        if failure.memory:
            return failure
        if isinstance(error, BadVersion):
            return BadVersion(error.reason, error.detail)
        return BadVersion(Reason.PROBE_FAILED, f"the probe does not run: {failure.text}")
    return None
