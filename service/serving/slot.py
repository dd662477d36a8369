"""The slot: the one place that says which servable is live, and which one takes its place if it fails."""

import threading

from service.serving.servable import Servable


class Slot:
    """Holds the live servable. A batch reads `current` once, and so belongs to one version.

    `previous` is the one before, kept ready while the live one is new and guarded.
    """

    def __init__(self) -> None:
        self.current: Servable | None = None
        self.previous: Servable | None = None
        self._changing = threading.Lock()

    def swap(self, servable: Servable, *, guarded: bool = False) -> Servable | None:
        """Make a servable the live one, and return the one before it, which is kept ready if the new one is `guarded`.

        Running requests keep the one before alive in any case.
        """
        with self._changing:
            before, self.current = self.current, servable
            self.previous = before if guarded else None
        return before

    def trust(self, version: int) -> None:
        """Guard the live servable no longer, if it is this version's."""
        with self._changing:
            if self.current is not None and self.current.version == version:
                self.previous = None

    def withdraw(self, servable: Servable) -> None:
        """Put the one before in a servable's place, or nothing where none is kept, if this servable still is live."""
        with self._changing:
            if self.current is servable:
                self.current, self.previous = self.previous, None
