"""What to do next: a pure function from what is known to one action. It touches no store and no clock."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Known:
    """What is known of the versions, by number.

    Attributes:
        live: the live version, where the store has it.
        versions: those in the store, ascending.
        pinned: the pinned one.
        rejected: those that must not go live.
        waiting: those that failed for now, and whose next try is still to come.
        stray: the live version, where the store no longer has it: another version may have its number.
        pin_is_stray: the pin means just that live version.
        pin_is_foreign: the pin means a version that neither is live nor in the store, whose number another one has.
    """

    live: int | None = None
    versions: tuple[int, ...] = ()
    pinned: int | None = None
    rejected: frozenset[int] = frozenset()
    waiting: frozenset[int] = frozenset()
    stray: int | None = None
    pin_is_stray: bool = False
    pin_is_foreign: bool = False

    @property
    def still(self) -> str:
        """What goes on answering, as the end of a sentence."""
        if self.stray is not None:
            return f"; still serving version {self.stray}, which is no longer in the store"
        return "" if self.live is None else f"; still serving version {self.live}"


@dataclass(frozen=True)
class Load:
    """Fetch, verify and warm this version, and let it go live."""

    version: int


@dataclass(frozen=True)
class Stay:
    """Leave things as they are. `about` is the version that would be loaded if it could be."""

    why: str
    about: int | None = field(default=None, compare=False)


def decide(known: Known) -> Load | Stay:
    """Return what to do. A pin is an order: only that version may go live. Without one, the newest good version may.

    Nothing ever takes the live version away without another to take its place.
    """
    return _follow_newest(known) if known.pinned is None else _follow_pin(known, known.pinned)


def _follow_pin(known: Known, pinned: int) -> Load | Stay:
    if known.pin_is_stray:
        return Stay(f"the pinned version {pinned} is live; it is no longer in the store")
    if known.pin_is_foreign:
        return Stay(f"the pinned version {pinned} is not in the store: another version has its number{known.still}")
    if pinned == known.live:
        return Stay(f"the pinned version {pinned} is live")
    if pinned not in known.versions:
        return Stay(f"the pinned version {pinned} is not in the store")
    return _load_pinned(known, pinned)


def _load_pinned(known: Known, pinned: int) -> Load | Stay:
    if pinned in known.rejected:
        return Stay(f"the pinned version {pinned} was rejected", pinned)
    if pinned in known.waiting:
        why = f"the pinned version {pinned} could not be loaded and will be tried again{known.still}"
        return Stay(why, pinned)
    return Load(pinned)


def _follow_newest(known: Known) -> Load | Stay:
    if not known.versions:
        serving = known.live if known.stray is None else known.stray
        if serving is not None:
            return Stay(f"the store has no versions any more; still serving version {serving}")
        return Stay("there is no version in the store yet")
    newer = known.versions
    # What only a pin had let go live is rejected once that is gone, and any good version takes its place.
    if known.live is not None and known.live not in known.rejected:
        newer = tuple(version for version in known.versions if version > known.live)
    for version in reversed(newer):
        if version not in known.rejected and version not in known.waiting:
            return Load(version)
    return _nothing_to_load(known, newer)


def _nothing_to_load(known: Known, newer: tuple[int, ...]) -> Stay:
    if waiting := [version for version in newer if version in known.waiting]:
        why = f"version {waiting[-1]} could not be loaded and will be tried again{known.still}"
        return Stay(why, waiting[-1])
    if known.live is None or known.live in known.rejected:
        return Stay(f"all {len(known.versions)} versions in the store were rejected{known.still}", known.versions[-1])
    if newer:
        return Stay(f"every version after the live {known.live} was rejected")
    return Stay(f"the newest version {known.live} is live")
