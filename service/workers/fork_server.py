"""The fork server: a process that forks the workers, because it has imported all they need and has no threads.

A supervisor cannot fork: only the thread that forks lives on in the child, and the locks of the others with it. So the
fork server is forked first. Each worker shares its memory with it, and is there in milliseconds. When the supervisor has
gone, however that came about, the fork server ends all workers and itself.
"""

import contextlib
import gc
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from typing import NoReturn

import structlog

from service.workers.channel import pair

log = structlog.get_logger("emaswap.service")

Work = Callable[[int, socket.socket], None]
"""What a worker does, given its number and its end of the channel to the supervisor."""

_MESSAGE_BYTES = 64
_REAP_EVERY_S = 0.2
_FORK_TIMEOUT_S = 10.0


class ForkServer:
    """The supervisor's side of the fork server."""

    def __init__(self, work: Work) -> None:
        """Fork it. This process must not have started a thread yet."""
        self._end, child_end = pair()
        # What is there by now is shared as long as nobody writes to it, and the cycle collector would.
        gc.collect()
        gc.freeze()
        self.pid = os.fork()
        if self.pid == 0:
            _live(child_end, self._end, work)
        child_end.close()
        self._end.settimeout(_FORK_TIMEOUT_S)

    def fork(self, worker: int) -> tuple[int, socket.socket]:
        """Fork a worker. Return its pid, and the supervisor's end of the channel to it. Raises `OSError`."""
        own, its = pair()
        with its:
            socket.send_fds(self._end, [str(worker).encode()], [its.fileno()])
            answer = self._end.recv(_MESSAGE_BYTES)
        if not answer:
            own.close()
            raise OSError("the fork server has gone")
        return int(answer), own

    def end(self) -> None:
        """End the fork server, and all workers that are still there."""
        self._end.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def is_alive(self) -> bool:
        """Return whether the fork server still runs."""
        try:
            return os.waitpid(self.pid, os.WNOHANG) == (0, 0)
        except ChildProcessError:
            return False


def _live(end: socket.socket, other: socket.socket, work: Work) -> NoReturn:
    """Fork workers until the supervisor has gone."""
    status = 1
    try:
        other.close()
        os.setsid()  # so that Ctrl-C reaches the supervisor alone, which ends the workers as it should
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        status = _serve(end, work)
    finally:
        sys.stdout.flush()
        os._exit(status)


def _serve(end: socket.socket, work: Work) -> int:
    workers: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(end, selectors.EVENT_READ)
        while True:
            if selector.select(_REAP_EVERY_S):
                data, files, _, _ = socket.recv_fds(end, _MESSAGE_BYTES, 1)
                if not data:
                    break
                pid = os.fork()
                if pid == 0:
                    end.close()
                    return _become(int(data), socket.socket(fileno=files[0]), work)
                os.close(files[0])
                workers[pid] = int(data)
                end.send(str(pid).encode())
            _reap(workers)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return 0


def _become(worker: int, channel: socket.socket, work: Work) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    work(worker, channel)
    return 0


def _reap(workers: dict[int, int]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            pid, status = ended
            worker, code = workers.pop(pid, None), os.waitstatus_to_exitcode(status)
            if code:
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"status {code}"
                log.warning("worker ended", worker=worker, pid=pid, how=how)
