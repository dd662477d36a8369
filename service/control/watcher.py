"""The watcher: when to look at the store. At every poll, when something is to be tried again, and when it is told to."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

from service.control.conductor import Conductor
from service.control.notices import Notices

# An error in a look must not make the next one follow at once.
_SHORTEST_WAIT_S = 0.01


class Watcher:
    """Has a conductor look at its store again and again."""

    def __init__(self, conductor: Conductor[Any], notices: Notices | None, *, poll_s: float) -> None:
        """Look every `poll_s` seconds or so, and at once when notices come from where the store is."""
        self._conductor = conductor
        self._notices = notices
        self._poll_s = poll_s
        # A generator of its own: the module's belongs to whoever runs in this process, and may have been seeded.
        self._random = random.Random()  # noqa: S311
        self._due = asyncio.Event()

    def wake(self) -> None:
        """Have the next look at once. Called on the event loop."""
        self._due.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        async with self._noticing():
            while True:
                self._due.clear()
                again_s = await self._conductor.settle()
                # Jitter keeps a fleet of replicas from asking all at once.
                poll_s = self._poll_s * self._random.uniform(0.8, 1.2)
                wait_s = poll_s if again_s is None else min(poll_s, max(again_s, _SHORTEST_WAIT_S))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._due.wait(), wait_s)

    @contextlib.asynccontextmanager
    async def _noticing(self) -> AsyncIterator[None]:
        if self._notices is None:
            yield
            return
        loop = asyncio.get_running_loop()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
                loop.call_soon_threadsafe(self.wake)

        self._notices.start(tell)
        try:
            yield
        finally:
            self._notices.stop()
