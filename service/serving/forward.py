"""Forward passes: requests run through a servable together, and when that fails, whose fault it was.

Memory that ran out is ours. Otherwise the requests of the batch run again, each alone, and the version's own probe
before and after: if the probe is answered as it was recorded, the requests that failed alone were at fault, and if not,
the version is broken. So a bad request costs each of its neighbours one further run, and a batch two proofs.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from emaswap import BadVersion, Identity, Reason
from service.logs import Seldom
from service.refusal import Code, Refusal, shorten
from service.serving.failure import Cause, Failure
from service.serving.metrics import ServingMetrics
from service.serving.runner import Runner
from service.serving.servable import Busy, Rows, Servable
from service.serving.slot import Slot
from service.serving.watchdog import Interrupted, Watchdog

log = structlog.get_logger("emaswap.service")

Result = TypeVar("Result")

Beat = Callable[[Any], Any]

# How long a version that has just answered its probe counts as whole for those who send it rubbish all the time.
_PROOF_LASTS_S = 0.1
# How long the end of the service waits for a batch that is still running.
_LAST_BATCH_S = 1.0


@dataclass(frozen=True)
class Ran:
    """The outputs of a batch, and how long it took."""

    outputs: Rows
    seconds: float


class Forward:
    """Runs forward passes: short ones where it is called, others on a thread that is left behind when one hangs."""

    def __init__(self, metrics: ServingMetrics, *, timeout_s: float) -> None:
        """One forward pass may take `timeout_s` seconds."""
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._runner = Runner("emaswap-forward")
        self._watchdog: Watchdog | None = None
        self._as_odd: Identity | None = None
        self._proven: tuple[Identity | None, float] = None, 0.0
        self._seldom = {cause: Seldom() for cause in Cause}

    def here(self, servable: Servable, inputs: Rows) -> Ran | Failure | None:
        """Run a batch on this thread, which is the event loop's. Raises `BadVersion` when the version hangs.

        Returns `None` where that cannot be: the module is at work elsewhere, or nobody could interrupt it here.
        """
        if self._watchdog is None:
            if threading.current_thread() is not threading.main_thread():
                return None
            self._watchdog = Watchdog(self._timeout_s)
        try:
            return self._watchdog.guard(lambda: _run(servable, inputs, wait=False))
        except Interrupted:
            raise self._timed_out(servable) from None

    async def aside(self, servable: Servable, inputs: Rows, *, chunk: int | None = None) -> Ran | Failure:
        """Run a batch on the thread, at most `chunk` rows at once. Raises `BadVersion` when the version hangs."""
        ran = await self._within_time(servable, lambda _: _run(servable, inputs, chunk=chunk))
        assert ran is not None
        return ran

    async def explain(self, servable: Servable, requests: list[Rows], failure: Failure) -> list[Rows | Refusal]:
        """Return outputs or a refusal for each request of a batch that failed.

        Raises `BadVersion` when the version is broken, or hangs.
        """
        if len(requests) == 1:
            return await self._blame(servable, requests, [failure])
        if not failure.memory:
            await self._prove(servable, failure)  # what is broken would fail with each of them
        alone = await self._within_time(servable, lambda beat: [beat(_run(servable, request)) for request in requests])
        results = [one if isinstance(one, Failure) else one.outputs for one in alone if one is not None]
        return await self._blame(servable, requests, results)

    def excuse(self, servable: Servable, request: Rows, failure: Failure) -> Refusal | None:
        """Return the refusal of a lone row that failed, without another look at the version; `None` if there must be one.

        For requests of clients that send such rows all the time: their neighbours would wait for every look. A version
        that breaks meanwhile is found out by the next failure of anybody else, or a moment later.
        """
        identity, until = self._proven
        if failure.memory or count(request) > 1 or identity != servable.manifest.identity or time.monotonic() > until:
            return None
        return self._refuse(servable, failure, 0)

    def is_suspect(self, outputs: Rows, slot: Slot[Servable]) -> bool:
        """Return whether a guarded version gave outputs that are not finite, which may be its inputs' fault or its own."""
        return (
            slot.previous is not None
            and slot.previous.manifest.identity != self._as_odd
            and bool(_odd_rows(outputs).any())
        )

    async def compare(self, servable: Servable, inputs: Rows, outputs: Rows, slot: Slot[Servable]) -> None:
        """Ask the version before for what the live one has no finite answer to. Raises `BadVersion` where it has one."""
        previous = slot.previous
        if previous is None or previous.signature != servable.signature:
            return
        odd = _odd_rows(outputs)
        try:
            before = await self.aside(previous, {name: value[odd] for name, value in inputs.items()})
        except BadVersion:  # it hangs: then there is nothing to return to
            slot.trust(servable.version)
            return
        if not isinstance(before, Ran) or _odd_rows(before.outputs).all():
            self._as_odd = previous.manifest.identity  # these answers are in the nature of the model
            return
        row = int(np.argmax(odd))
        failure = Failure(
            f"row {row} of a batch has no finite answer, and version {previous.version} has one", "", memory=False
        )
        self._note(Cause.VERSION, servable, failure)
        raise BadVersion(Reason.ANSWERS_NOT_FINITE, failure.text)

    def close(self) -> None:
        """End the thread. A forward pass that does not end soon is left behind."""
        self._runner.end(wait_s=_LAST_BATCH_S)
        if self._watchdog:
            self._watchdog.close()

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
        verdict = await self._within_time(servable, lambda _: _verdict(servable))
        if isinstance(verdict, BadVersion):
            self._note(Cause.VERSION, servable, suspect)
            raise BadVersion(verdict.reason, shorten(f"{verdict.detail}; a request had failed: {suspect.text}"))
        if verdict is None:
            self._proven = servable.manifest.identity, time.monotonic() + _PROOF_LASTS_S
        return verdict

    async def _row_at_fault(self, servable: Servable, request: Rows) -> int | None:
        """Return the first row that fails alone, found by halving, or `None` if the rows fail only together."""
        first, end, seen = 0, count(request), True
        while end - first > 1 or not seen:
            middle = max(first + 1, (first + end) // 2)
            result = await self.aside(servable, {name: rows[first:middle] for name, rows in request.items()})
            if isinstance(result, Failure):
                if result.memory:
                    return None
                end, seen = middle, True
            elif middle == end:
                return None
            else:
                first, seen = middle, False
        return first

    async def _within_time(self, servable: Servable, job: Callable[[Beat], Result]) -> Result:
        """Return what a job on the thread returns. Raises `BadVersion` when one of its passes takes too long.

        The job calls the function that it is given after each of its passes but the last, with what that gave.
        """
        began = time.monotonic()

        def beat(ran: Any) -> Any:
            nonlocal began
            began = time.monotonic()
            return ran

        done = self._runner.begin(lambda: job(beat))
        try:
            while (left_s := began + self._timeout_s - time.monotonic()) > 0 and not done.done():
                await asyncio.wait({done}, timeout=left_s)
            if done.done():
                return done.result()
        finally:
            if not done.done():
                done.cancel()
        self._runner.end()
        self._runner = Runner("emaswap-forward")
        raise self._timed_out(servable)

    def _timed_out(self, servable: Servable) -> BadVersion:
        failure = Failure(f"a forward pass did not end within {self._timeout_s:g} s", "", memory=False)
        self._note(Cause.TIMEOUT, servable, failure)
        return BadVersion(Reason.FORWARD_TIMEOUT, failure.text)

    def _note(self, cause: Cause, servable: Servable, failure: Failure) -> None:
        self._metrics.failed(cause)
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


def _run(servable: Servable, inputs: Rows, *, chunk: int | None = None, wait: bool = True) -> Ran | Failure | None:
    """Return the outputs of a batch, or why there are none. Never raises.

    `None` means that another thread runs the module just now, which this one does not `wait` for.
    """
    began = time.perf_counter()
    try:
        rows = count(inputs)
        if chunk is None or rows <= chunk:
            outputs = servable.run(inputs, wait=wait)
        else:
            parts = [
                servable.run({name: value[first : first + chunk] for name, value in inputs.items()})
                for first in range(0, rows, chunk)
            ]
            outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    except Busy:
        return None
    except Interrupted:
        raise
    except BaseException as error:  # forward is somebody else's code and may raise anything
        return Failure.of(error)
    return Ran(outputs, time.perf_counter() - began)


def _odd_rows(outputs: Rows) -> NDArray[np.bool_]:
    """Return for each row whether a number in its outputs is not finite."""
    odd = np.zeros(count(outputs), np.bool_)
    for output in outputs.values():
        if output.dtype.kind == "f" and not np.isfinite(output).all():
            odd |= ~np.isfinite(output).reshape(len(output), -1).all(axis=1)
    return odd


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
