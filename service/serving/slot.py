"""The slot: the one place that says which version is live, and which one takes its place if it fails."""

import threading
from typing import Generic, TypeVar

from service.serving.servable import Served

Live = TypeVar("Live", bound=Served)


class Slot(Generic[Live]):
    """Holds the live version. A batch reads `current` once, and so belongs to one version.

    `previous` is the one before, kept ready while the live one is new and guarded.
    """

    def __init__(self) -> None:
        self._current: Live | None = None
        self._previous: Live | None = None
        self._changing = threading.Lock()

    @property
    def current(self) -> Live | None:
        """The live version."""
        return self._current

    @property
    def previous(self) -> Live | None:
        """What takes its place if it fails."""
        return self._previous

    def swap(self, new: Live, *, guarded: bool = False, keep: bool = False) -> Live | None:
        """Make a version the live one, and return the one before it, which is kept ready if the new one is `guarded`.

        With `keep`, what is kept ready stays so where there is something. Running requests keep the one before alive
        in any case.
        """
        with self._changing:
            before, self._current = self._current, new
            kept = self._previous if keep and self._previous is not None else before
            self._previous = kept if guarded else None
        return before

    def trust(self, version: int) -> None:
        """Guard the live version no longer, if it has this number."""
        with self._changing:
            if self._current is not None and self._current.version == version:
                self._previous = None

    def withdraw(self, broken: Live) -> None:
        """Let a version answer no more: the one before takes its place if it is live, or nothing where none is kept."""
        with self._changing:
            if self._current is broken:
                self._current, self._previous = self._previous, None
            elif self._previous is broken:
                self._previous = None
