"""A lane: blocking work, one piece after another on a thread of low priority, which can be given up when it hangs."""

import asyncio
import contextlib
import functools
import threading
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

from emaswap.priority import give_way

Result = TypeVar("Result")

_Done = Callable[[Any, BaseException | None], None]


class Hung(Exception):
    """A piece of work did not end in time, and was given up. `hangs` tells whether it still has not ended."""

    def __init__(self, message: str, hangs: Callable[[], bool]) -> None:
        super().__init__(message)
        self.hangs = hangs


class Blocked(Exception):
    """So many pieces of work hang already that no more are begun until one of them ends."""


class Lane:
    """Runs work off the event loop. A piece that takes too long is left behind with its thread, and the next has another."""

    def __init__(self, name: str, *, most_hung: int = 4) -> None:
        """`name` is that of the threads; at most `most_hung` of them may hang."""
        self._name = name
        self._most_hung = most_hung
        self._thread: _Thread | None = None
        self._left: list[_Thread] = []
        self._turn = asyncio.Lock()

    @property
    def hung(self) -> int:
        """How many pieces of work were given up and have not ended since."""
        self._left = [thread for thread in self._left if thread.is_alive()]
        return len(self._left)

    async def run(self, work: Callable[[], Result], timeout_s: float) -> Result:
        """Run work and return what it returns, or raise what it raises.

        Raises:
            Hung: when it took longer than `timeout_s` seconds.
            Blocked: when too many earlier pieces hang.
        """
        async with self._turn:
            if self.hung >= self._most_hung:
                raise Blocked(f"{self._most_hung} attempts that were given up still hang: restart the service")
            if self._thread is None:
                self._thread = _Thread(self._name)
            loop = asyncio.get_running_loop()
            ended: asyncio.Future[Result] = loop.create_future()
            self._thread.begin(work, functools.partial(_tell, loop, ended))
            try:
                await asyncio.wait({ended}, timeout=timeout_s)
                if not ended.done():
                    raise Hung(f"not done within {timeout_s:g} s", self._thread.is_alive)
                return ended.result()
            finally:
                if not ended.done():
                    self._leave_behind(self._thread)
                del ended  # its exception would keep this frame, and be kept by it

    def close(self) -> None:
        """Let the thread end; do not wait for work that is under way."""
        if self._thread is not None:
            self._thread.end()
            self._thread = None

    def _leave_behind(self, thread: "_Thread") -> None:
        thread.end()
        self._left.append(thread)
        self._thread = None


class _Thread(threading.Thread):
    """Takes work from a queue. A daemon, so that the process can end while it hangs."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._jobs: SimpleQueue[tuple[Callable[[], Any], _Done] | None] = SimpleQueue()
        self.start()

    def begin(self, work: Callable[[], Any], done: _Done) -> None:
        """Have work run, and `done` called on this thread with its result or its error."""
        self._jobs.put((work, done))

    def end(self) -> None:
        """End once the work that was begun is done."""
        self._jobs.put(None)

    def run(self) -> None:
        give_way()
        while job := self._jobs.get():
            work, done = job
            try:
                result, error = work(), None
            except BaseException as raised:  # it is raised again where the work is waited for
                _clear(raised)
                result, error = None, raised
            done(result, error)
            del job, work, done, result, error  # an idle thread keeps nothing alive


def _tell(
    loop: asyncio.AbstractEventLoop, ended: "asyncio.Future[Any]", result: object, error: BaseException | None
) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
        loop.call_soon_threadsafe(_settle, ended, result, error)


def _settle(ended: "asyncio.Future[Any]", result: object, error: BaseException | None) -> None:
    if ended.done():
        return
    if error is None:
        ended.set_result(result)
    elif isinstance(error, Exception) and not isinstance(error, StopIteration):
        ended.set_exception(error)
    else:  # a future takes no StopIteration, and none of the others may end the event loop
        ended.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))


def _clear(error: BaseException) -> None:
    """Let go of what the frames of an error hold: they may hold all the weights."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        traceback.clear_frames(following.__traceback__)
        following = following.__cause__ or following.__context__
