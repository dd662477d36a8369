"""Words in memory that a supervisor and its workers share: which version is live, and how the workers fare."""

import mmap
import time

from service.serving.servable import Servable
from service.serving.slot import Slot

_WORD = 8
# Each writer has a cache line of its own.
_LINE = 64 // _WORD
_HALF = 32
_MASK = (1 << _HALF) - 1


class Flip:
    """One shared word says which version answers. A worker reads it once a batch, so all of them change together.

    The word names a load by its number, never a version by its own: the same version may be loaded twice.
    """

    def __init__(self, workers: int) -> None:
        """Make the memory. Processes that are forked from this one share it."""
        self.workers = workers
        memory = mmap.mmap(-1, (1 + workers) * _LINE * _WORD)
        self._words = memoryview(memory).cast("Q")

    def write(self, load: int, previous: int) -> None:
        """Make a load the live one, with the previous one kept ready to take its place if it fails; 0 for none."""
        self._words[0] = load << _HALF | previous

    def read(self) -> int:
        """Return the word, which names both loads."""
        return self._words[0]

    def beat(self, worker: int) -> None:
        """Note that a worker is alive."""
        self._words[(1 + worker) * _LINE] = time.monotonic_ns()

    def silent_s(self, worker: int) -> float:
        """Return the seconds since a worker's last beat."""
        return (time.monotonic_ns() - self._words[(1 + worker) * _LINE]) / 1e9

    def hold(self, worker: int, connections: int) -> None:
        """Note how many connections a worker has; none takes part that has not said so."""
        self._words[(1 + worker) * _LINE + 1] = connections + 1

    def leave(self, worker: int) -> None:
        """Note that a worker takes no connections."""
        self._words[(1 + worker) * _LINE + 1] = 0

    def fewest(self) -> int:
        """Return the fewest connections that a worker has which takes some."""
        held = [self._words[(1 + worker) * _LINE + 1] for worker in range(self.workers)]
        return min((count - 1 for count in held if count), default=0)


class FlippedSlot(Slot[Servable]):
    """A worker's slot: what is live is what the shared word says, among what this worker has prepared."""

    def __init__(self, flip: Flip) -> None:
        super().__init__()
        self._flip = flip
        self._word = 0
        self._prepared: dict[int, Servable] = {}
        self._broken: set[int] = set()

    @property
    def current(self) -> Servable | None:
        """The live version."""
        if self._flip.read() != self._word:
            self._follow()
        return self._current

    def prepare(self, load: int, servable: Servable) -> None:
        """Keep a version ready under the number of its load."""
        self._prepared[load] = servable
        self._follow()

    def drop(self, load: int) -> None:
        """Keep a version ready no longer."""
        self._prepared.pop(load, None)
        self._broken.discard(load)
        self._follow()

    def withdraw(self, broken: Servable) -> None:
        """Let a version answer no more in this worker: the previous one does until the word says otherwise."""
        self._broken |= {load for load, each in self._prepared.items() if each is broken}
        self._follow()

    def load_of(self, servable: Servable) -> int | None:
        """Return the number of a version's load; `None` when it has been dropped."""
        return next((load for load, each in self._prepared.items() if each is servable), None)

    def _follow(self) -> None:
        self._word = word = self._flip.read()
        live, previous = word >> _HALF, word & _MASK
        before = None if previous in self._broken else self._prepared.get(previous)
        if live in self._broken:
            self._current, self._previous = before, None
        else:
            self._current, self._previous = self._prepared.get(live), before
