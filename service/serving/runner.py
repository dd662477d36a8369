"""A thread for work that may hang: one job at a time, and a job that does not end is left behind with its thread."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")

_Jobs = SimpleQueue[tuple["Future[Any]", Callable[[], Any]] | None]


class Runner:
    """Runs jobs on one daemon thread, which the first job starts. Called on the event loop only."""

    def __init__(self, name: str) -> None:
        self._jobs: _Jobs = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)

    async def run(self, job: Callable[[], Result]) -> Result:
        """Return what the job returns. The job must not raise, or must raise nothing that asyncio keeps for itself."""
        if self._thread.ident is None:
            self._thread.start()
        future: Future[Result] = Future()
        self._jobs.put((future, job))
        return await asyncio.wrap_future(future)

    def end(self, wait_s: float = 0.0) -> None:
        """Let the thread end after its job, and wait so long for that. If the job never ends, the process still can."""
        self._jobs.put(None)
        if self._thread.ident is not None and wait_s:
            self._thread.join(wait_s)


def _work(jobs: _Jobs) -> None:
    while (item := jobs.get()) is not None:
        future, job = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(job())
            except BaseException as error:  # whoever asked for the job has to know, whatever it is
                future.set_exception(error)
        del item, future, job  # while the thread waits, it keeps nobody's tensors alive
