"""A thread for work that may hang: one job at a time, and a job that does not end is left behind with its thread."""

import asyncio
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from emaswap.errors import describe

Result = TypeVar("Result")

_Jobs = SimpleQueue[tuple["Future[Any]", Callable[[], Any]] | None]


class Runner:
    """Runs jobs on one daemon thread, which the first job starts. Called on the event loop only."""

    def __init__(self, name: str, *, prepare: Callable[[], None] | None = None) -> None:
        """`name` is the thread's; `prepare` runs on it before its first job."""
        self._jobs: _Jobs = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs, prepare), name=name, daemon=True)

    def is_alive(self) -> bool:
        """Return whether the thread has begun and has not ended."""
        return self._thread.is_alive()

    def begin(self, job: Callable[[], Result]) -> "asyncio.Future[Result]":
        """Begin a job, and return the future of what it returns or raises. Cancel it to have nobody told.

        What would end a program or a coroutine comes back as a `RuntimeError`.
        """
        if self._thread.ident is None:
            self._thread.start()
        future: Future[Result] = Future()
        self._jobs.put((future, job))
        return asyncio.wrap_future(future)

    async def run(self, job: Callable[[], Result]) -> Result:
        """Return what the job returns, or raise what it raises."""
        return await self.begin(job)

    def end(self, wait_s: float = 0.0) -> None:
        """Let the thread end after its job, and wait so long for that. If the job never ends, the process still can."""
        self._jobs.put(None)
        if self._thread.ident is not None and wait_s:
            self._thread.join(wait_s)


def _work(jobs: _Jobs, prepare: Callable[[], None] | None) -> None:
    if prepare is not None:
        prepare()
    while (item := jobs.get()) is not None:
        future, job = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(job())
            except BaseException as error:  # whoever asked for the job has to know, whatever it is
                _clear(error)
                future.set_exception(_to_be_raised(error))
        del item, future, job  # while the thread waits, it keeps nobody's tensors alive


def _to_be_raised(error: BaseException) -> Exception:
    """Return an error that a coroutine can raise: a future takes no StopIteration, and others would end the event loop."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RuntimeError(describe(error))


def _clear(error: BaseException) -> None:
    """Let go of what the frames of an error hold: they may hold all the weights."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        traceback.clear_frames(following.__traceback__)
        following = following.__cause__ or following.__context__
