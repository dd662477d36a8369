"""The slot: the one place that says which servable is live."""

from service.serving.servable import Servable


class Slot:
    """Holds the live servable. Reading `current` once is all a batch does to belong to one version."""

    def __init__(self) -> None:
        self.current: Servable | None = None

    def swap(self, servable: Servable) -> Servable | None:
        """Make a servable the live one; the one before it, which its running requests keep alive until they end."""
        before, self.current = self.current, servable
        return before
