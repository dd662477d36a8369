"""Arenas: memory that a supervisor fills with a version's weights and all workers map, so that there is one copy."""

import fcntl
import mmap
import os
import threading

import numpy as np
from numpy.typing import NDArray

from emaswap.errors import Short
from emaswap.files import memory

# The kernel has known it since 5.1, Python's fcntl only later.
_SEAL_FUTURE_WRITE = 0x10
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _SEAL_FUTURE_WRITE
# More than this many times what is needed would be memory that lies idle.
_MAX_SLACK = 2


class Arena:
    """Shared memory that this process alone may write to. Sealed: nobody can resize it, or map it to write."""

    def __init__(self, count: int) -> None:
        """Make room for so many bytes. Raises `Short` when there is none."""
        memory.require(count, "an arena for weights")
        try:
            self.file = os.memfd_create("emaswap-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise Short(f"there is no file for an arena: {error.strerror}") from error
        try:
            os.ftruncate(self.file, count)
            self._map = mmap.mmap(self.file, count)
            # Sealed once it is mapped here: F_SEAL_WRITE would be refused beside a map to write.
            fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            os.close(self.file)
            raise Short(f"there is no memory for an arena of {count} bytes: {error.strerror}") from error
        self.count = count

    def bytes(self) -> NDArray[np.uint8]:
        """Return the memory."""
        return np.frombuffer(self._map, np.uint8)

    def close(self) -> None:
        """Give the memory back to the system once nobody maps it any more."""
        os.close(self.file)


class Arenas:
    """Arenas that are used in turn: filling pages that are there takes a seventh of the time that fresh ones take."""

    def __init__(self) -> None:
        self._idle: Arena | None = None
        self._turn = threading.Lock()

    def take(self, count: int) -> Arena:
        """Return an arena of at least so many bytes, which is the caller's until it comes back."""
        with self._turn:
            idle, self._idle = self._idle, None
        if idle is not None:
            if count <= idle.count <= _MAX_SLACK * count:
                return idle
            idle.close()
        return Arena(count)

    def give_back(self, arena: Arena) -> None:
        """Take back an arena that nobody maps any more. One is kept."""
        with self._turn:
            before, self._idle = self._idle, arena
        if before is not None:
            before.close()


def map_privately(file: int, count: int) -> mmap.mmap:
    """Return a map of an arena's bytes. What is written to it is this process's own, and nobody else sees it."""
    return mmap.mmap(file, count, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
