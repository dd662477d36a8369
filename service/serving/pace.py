"""The pace of a model: how many rows its next batch should have, and whether the event loop can wait for it.

A pure account of measured times. Batches are told apart by size, in powers of two.
"""

_QUICK_S = 1e-3
"""What the event loop can wait for. Longer batches run on a thread, while the loop reads and parses."""

_SLOW_S = 10e-3
"""One batch that takes longer is reason enough for the next to run on a thread, whatever the average is."""

_AS_GOOD = 1.1
"""Batches whose time a row is within this factor of the best count as good: the larger, the fewer."""

_CERTAIN = 8
"""After so many batches of a size its time is an average; before, the least, because first runs are slow."""

_WEIGHT = 0.1
_OUTLIER = 4.0
_PERIOD = 128
"""Once in so many batches another size is tried again: what was slow then may be quick now."""


class Pace:
    """What is known of the time that batches take."""

    def __init__(self, max_rows: int) -> None:
        """No batch shall have more than `max_rows` rows."""
        self._max_rows = max_rows
        self.forget()

    def forget(self) -> None:
        """Begin anew, for another model."""
        self._per_row: dict[int, float] = {}
        self._seen: dict[int, int] = {}
        self._quick: set[int] = set()
        self._batches = 0
        self._steady = self._max_rows

    def note(self, rows: int, seconds: float) -> None:
        """Note that a batch of so many rows took so long."""
        size = _size(rows)
        sample, known, seen = seconds / rows, self._per_row.get(size), self._seen.get(size, 0)
        if known is None or (seen < _CERTAIN and sample < known):
            self._per_row[size] = sample
        elif seen >= _CERTAIN:
            self._per_row[size] = known + _WEIGHT * (min(sample, _OUTLIER * known) - known)
        self._seen[size] = seen + 1
        self._batches += 1
        took = self._per_row[size] * (1 << size)
        if seconds > _SLOW_S:
            self._quick.discard(size)
        elif took <= _QUICK_S:
            self._quick.add(size)
        elif took > 1.5 * _QUICK_S:
            self._quick.discard(size)
        if self._batches % 16 == 0 or seen < _CERTAIN:
            self._steady = self._best()

    @property
    def limit(self) -> int:
        """The most rows of the next batch."""
        if self._batches % _PERIOD == 0 and self._steady < self._max_rows:
            return min(2 * self._steady, self._max_rows)
        return self._steady

    def is_quick(self, rows: int) -> bool:
        """Return whether batches of so many rows are known to be so quick that the event loop can wait for one."""
        return _size(rows) in self._quick

    def _best(self) -> int:
        """Return the size up to which larger batches are known to be no worse, or are not known."""
        good = min(self._per_row.values()) * _AS_GOOD
        best = max(size for size, per_row in self._per_row.items() if per_row <= good)
        if max(self._per_row) == best:
            return self._max_rows
        if best + 1 not in self._per_row:
            best += 1
        return min(1 << best, self._max_rows)


def _size(rows: int) -> int:
    """Return the exponent of the least power of two that is not below `rows`."""
    return (rows - 1).bit_length()
