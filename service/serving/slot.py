"""The slot: the one place that says which servable is live."""

import threading

from service.serving.servable import Servable


class Slot:
    """Holds the live servable. A batch reads `current` once, and so belongs to one version."""

    def __init__(self) -> None:
        self.current: Servable | None = None
        self._changing = threading.Lock()

    def swap(self, servable: Servable) -> Servable | None:
        """Make a servable the live one, and return the one before it. Its running requests keep that alive."""
        with self._changing:
            before, self.current = self.current, servable
        return before

    def withdraw(self, servable: Servable) -> None:
        """Leave nothing live, if this servable still is."""
        with self._changing:
            if self.current is servable:
                self.current = None
