"""A lane: blocking work, one piece after another on a thread of low priority, which can be given up when it hangs."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from emaswap.priority import give_way
from service.serving.runner import Runner

Result = TypeVar("Result")


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
        self._runner: Runner | None = None
        self._left: list[Runner] = []
        self._turn = asyncio.Lock()

    @property
    def hung(self) -> int:
        """How many pieces of work were given up and have not ended since."""
        self._left = [runner for runner in self._left if runner.is_alive()]
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
            if self._runner is None:
                self._runner = Runner(self._name, prepare=give_way)
            ended = self._runner.begin(work)
            try:
                await asyncio.wait({ended}, timeout=timeout_s)
                if not ended.done():
                    raise Hung(f"not done within {timeout_s:g} s", self._runner.is_alive)
                return ended.result()
            finally:
                if not ended.done():
                    ended.cancel()
                    self._leave_behind(self._runner)
                del ended  # its exception would keep this frame, and be kept by it

    def close(self) -> None:
        """Let the thread end; do not wait for work that is under way."""
        if self._runner is not None:
            self._runner.end()
            self._runner = None

    def _leave_behind(self, runner: Runner) -> None:
        runner.end()
        self._left.append(runner)
        self._runner = None
