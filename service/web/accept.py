"""Accepting connections from a socket that several workers share, so that each gets its part of them.

Every worker hears of every connection. One that has more of them than another waits a moment before it takes it, so
that the other does; if that one does not, it takes it all the same. The kernel's own ways are worse for connections that
stay: which worker wakes up first is chance, and SO_REUSEPORT draws lots for each.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable

_PATIENCE_S = 0.002


class Acceptor:
    """Takes connections from a listening socket."""

    def __init__(
        self, listener: socket.socket, connect: Callable[[], asyncio.Protocol], ahead: Callable[[], bool]
    ) -> None:
        """Make a protocol of each connection by `connect`. `ahead` says whether another worker has fewer."""
        self._listener = listener
        self._connect = connect
        self._ahead = ahead
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._loop.add_reader(listener, self._heard)

    async def close(self, *, for_all: bool) -> None:
        """Take what has come, and no further connections. With `for_all`, no other process can take one either."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        else:
            self._loop.remove_reader(self._listener)
        while self._accept():
            pass
        if for_all:  # at once, so that nobody waits in vain for being taken
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _heard(self) -> None:
        if self._ahead():
            self._loop.remove_reader(self._listener)
            self._timer = self._loop.call_later(_PATIENCE_S, self._waited)
        else:
            self._accept()

    def _waited(self) -> None:
        self._timer = None
        self._loop.add_reader(self._listener, self._heard)
        self._accept()

    def _accept(self) -> bool:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # another worker was quicker, or files are short: the next one is heard of
            return False
        connection.setblocking(False)
        task = self._loop.create_task(self._loop.connect_accepted_socket(self._connect, connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True
