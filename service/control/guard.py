"""The guard: how long the version before is kept ready to take the place of a new one that fails."""

import asyncio
import math
import time
from typing import Generic

from service.serving.slot import Live, Slot


class Guard(Generic[Live]):
    """Swaps versions in a slot, and trusts each new one only after a while. Belongs to the event loop."""

    def __init__(self, slot: Slot[Live], seconds: float) -> None:
        """Guard each version for so many seconds; 0 for never."""
        self._slot = slot
        self._seconds = seconds
        self._kept_since = -math.inf
        self._timer: asyncio.TimerHandle | None = None

    def swap(self, new: Live, *, may_return: bool) -> Live | None:
        """Make a version the live one, and return the one before it.

        That is kept ready if one `may_return` to it. Where versions follow quickly, what is kept already stays, so that each
        new one is compared with one that has stood the test, and not with the last that came.
        """
        guarded = may_return and self._seconds > 0
        keep = time.monotonic() - self._kept_since < self._seconds
        before = self._slot.swap(new, guarded=guarded, keep=keep)
        if self._slot.previous is before:
            self._kept_since = time.monotonic()
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._seconds, self._slot.trust, new.version) if guarded else None
        return before
