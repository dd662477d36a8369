"""A watchdog over work on the main thread: it interrupts what takes too long, and ends the process if that does not help."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

log = structlog.get_logger("emaswap.service")

Result = TypeVar("Result")

# Ignored where nobody listens, so one that comes too late does no harm.
_SIGNAL = signal.SIGURG
# How long work may take to end after it was interrupted. Native code cannot be, and only the process's end ends it.
_LAST_S = 5.0
_EXIT_STATUS = 70  # EX_SOFTWARE


class Interrupted(BaseException):
    """Raised in the middle of guarded work that takes too long."""


class Watchdog:
    """Guards one piece of work after another on the main thread, at next to no cost for those that end in time."""

    def __init__(self, timeout_s: float) -> None:
        """Interrupt work after `timeout_s` seconds. Only the main thread can be guarded, and only it makes a watchdog."""
        self._timeout_s = timeout_s
        self._began: float | None = None
        self._closed = threading.Event()
        self._main = threading.main_thread().ident
        self._before = signal.signal(_SIGNAL, self._interrupt)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def guard(self, work: Callable[[], Result]) -> Result:
        """Return what the work returns. `Interrupted` is raised within it when it takes too long."""
        self._began = time.monotonic()
        try:
            return work()
        finally:
            self._began = None

    def close(self) -> None:
        """End the watch."""
        self._closed.set()
        if threading.current_thread() is threading.main_thread():
            signal.signal(_SIGNAL, self._before)

    def _late_by(self) -> float:
        """Return by how many seconds the current work is late; below 0 when it is not, or there is none."""
        began = self._began
        return -1.0 if began is None else time.monotonic() - began - self._timeout_s

    def _watch(self) -> None:
        assert self._main is not None
        while not self._closed.wait(min(0.25, self._timeout_s / 4)):
            late_by = self._late_by()
            if late_by > _LAST_S:
                log.error("a forward pass hangs and cannot be interrupted; ending, so that a supervisor can start anew")
                os._exit(_EXIT_STATUS)
            if late_by > 0:
                signal.pthread_kill(self._main, _SIGNAL)

    def _interrupt(self, *_: object) -> None:
        if self._late_by() > 0:
            raise Interrupted
