"""Limits on the connections of a service: how many there are, and how long each may wait for its client."""

import asyncio
import resource
from typing import Protocol

_LONGEST_TICK_S = 1.0
# Files that the process needs for other things than connections: the store, logs, the event loop.
_OTHER_FILES = 40


class Bounded(Protocol):
    """A connection. `due` is the time of the event loop at which it has waited long enough for its client."""

    due: float | None

    @property
    def is_idle(self) -> bool:
        """Whether nothing would be lost if it were closed."""

    def expire(self) -> None:
        """Give the client up."""


class Limits:
    """Counts connections, and gives up those whose clients keep them waiting."""

    def __init__(self, *, most: int, idle_s: float, head_s: float, body_s: float) -> None:
        """At most `most` connections are open. A client has so long to begin a request, to send its head, its body."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.most = max(1, min(most, files - _OTHER_FILES))
        self.idle_s, self.head_s, self.body_s = idle_s, head_s, body_s
        self._tick_s = min(_LONGEST_TICK_S, idle_s / 4, head_s / 4, body_s / 4)
        self._open: set[Bounded] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def opened(self, connection: Bounded) -> bool:
        """Count a connection. Where there are too many, an idle one is closed; return whether there was room."""
        if len(self._open) >= self.most:
            idle = [each for each in self._open if each.is_idle]
            if not idle:
                return False
            longest = min(idle, key=lambda each: each.due or 0.0)
            self._open.discard(longest)
            longest.expire()
        self._open.add(connection)
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.call_later(self._tick_s, self._sweep)
        return True

    def closed(self, connection: Bounded) -> None:
        """Count a connection no more."""
        self._open.discard(connection)

    def _sweep(self) -> None:
        assert self._loop is not None
        now = self._loop.time()
        for connection in list(self._open):
            if connection.due is not None and connection.due <= now:
                connection.expire()
        if self._open:
            self._loop.call_later(self._tick_s, self._sweep)
        else:
            self._loop = None
