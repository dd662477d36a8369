"""Memory that is used again: pages that are there are filled seven times as fast as fresh ones."""

import mmap
import threading
import weakref

import numpy as np
from numpy.typing import NDArray

from emaswap.errors import Short
from emaswap.files import memory

# More than this many times what is needed would be memory that lies idle.
_MAX_SLACK = 2


class Recycled:
    """Supplies memory for tensor files. What nothing looks at any more is kept for the next file, one piece of it."""

    def __init__(self) -> None:
        self._idle: mmap.mmap | None = None
        # The cycle collector may let go of memory on the very thread that asks for some.
        self._turn = threading.RLock()

    def __call__(self, count: int) -> NDArray[np.uint8]:
        """Return memory of so many bytes. Raises `Short` when there is not so much."""
        with self._turn:
            pages, self._idle = self._idle, None
        if pages is None or not count <= len(pages) <= _MAX_SLACK * count:
            del pages  # before others are asked for
            pages = _fresh(count)
        found = np.frombuffer(pages, np.uint8)
        # Views keep it alive, be they arrays or tensors.
        weakref.finalize(found, self._keep, pages).atexit = False
        return found[:count]

    def _keep(self, pages: mmap.mmap) -> None:
        with self._turn:
            self._idle = pages


def _fresh(count: int) -> mmap.mmap:
    memory.require(count, "a tensor file")
    try:
        return mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE)
    except (OSError, MemoryError) as error:
        raise Short(f"there is no memory for a tensor file of {count} bytes: {error}") from None
