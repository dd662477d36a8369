"""Threads that give way to those that do the work in front of users, or of a training step."""

import contextlib
import os
import threading

# At 19 such a thread starved while others kept every core busy; at 10 it still gets its turn.
_NICENESS = 10


def give_way() -> None:
    """Lower the calling thread's priority, where threads have one of their own (Linux)."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
