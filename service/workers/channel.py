"""A channel between a supervisor and one worker: small messages, with files beside them where bytes are large."""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

Message = dict[str, Any]

_MAX_BYTES = 128 << 10
_MAX_FILES = 4


class Channel:
    """One end of a connection that keeps messages apart and in order. Used on the event loop only."""

    def __init__(self, end: socket.socket) -> None:
        """Take over a socket, as `pair` makes them."""
        self._end = end
        self._end.setblocking(False)

    def listen(self, received: Callable[[Message, list[int]], None], closed: Callable[[], None]) -> None:
        """Call `received` with each message and its files, which it closes, and `closed` when the other end has gone."""
        self._received, self._closed = received, closed
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._end.fileno(), self._read)

    def send_soon(self, message: Message) -> None:
        """Send a message from any thread, unless the event loop has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.send, message)

    def send(self, message: Message, files: Sequence[int] = ()) -> bool:
        """Send a message. Return false when the other end has gone, or takes none any more."""
        try:
            socket.send_fds(self._end, [json.dumps(message).encode()], list(files))
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close this end; nobody is told any more."""
        if self._end.fileno() >= 0:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.remove_reader(self._end.fileno())
            self._end.close()

    def _read(self) -> None:
        try:
            data, files, _, _ = socket.recv_fds(self._end, _MAX_BYTES, _MAX_FILES, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, files = b"", []
        if data:
            self._received(json.loads(data), files)
            return
        for file in files:
            os.close(file)
        self._loop.remove_reader(self._end.fileno())
        self._closed()


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a connection."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
