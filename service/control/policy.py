"""What to do next: a pure function from what is known to one action. It touches no store and no clock."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """Version numbers: the live one, those in the store (ascending), the pinned one, those that were rejected."""

    live: int | None = None
    versions: tuple[int, ...] = ()
    pinned: int | None = None
    rejected: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Load:
    """Fetch, verify and warm this version, and let it go live."""

    version: int


@dataclass(frozen=True)
class Stay:
    """Leave things as they are."""

    why: str


def decide(known: Known) -> Load | Stay:
    """A pin is an order: just that version may go live. Without one, the newest version that was not rejected may.

    Nothing ever takes the live version away without another to take its place.
    """
    return _follow_newest(known) if known.pinned is None else _follow_pin(known, known.pinned)


def _follow_pin(known: Known, pinned: int) -> Load | Stay:
    if pinned == known.live:
        return Stay(f"the pinned version {pinned} is live")
    if pinned not in known.versions:
        return Stay(f"the pinned version {pinned} is not in the store")
    if pinned in known.rejected:
        return Stay(f"the pinned version {pinned} was rejected")
    return Load(pinned)


def _follow_newest(known: Known) -> Load | Stay:
    if not known.versions:
        if known.live is not None:
            return Stay(f"there is no version in the store any more; version {known.live} goes on")
        return Stay("there is no version in the store yet")
    newer = [version for version in known.versions if known.live is None or version > known.live]
    if untried := [version for version in newer if version not in known.rejected]:
        return Load(untried[-1])
    if known.live is None:
        return Stay(f"all {len(known.versions)} versions in the store were rejected")
    if newer:
        return Stay(f"every version after the live {known.live} was rejected")
    return Stay(f"the newest version {known.live} is live")
