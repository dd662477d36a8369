"""Versions that must not go live: rejected ones, as long as their bytes are what they were, and ones that failed for now.

What failed for now is tried again, and what was rejected is looked at for other bytes, at times that lie twice as far
apart each time. Knows no store: whoever asks brings the stamps.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from emaswap import BadVersion, Reason
from service.refusal import shorten

Stamps = dict[str, str | None]
"""What changes when the bytes of a version's files may have, by file."""

_FIRST_RETRY_S = 0.25
_LAST_RETRY_S = 60.0
_LAST_CHECK_S = 300.0
# More of them would hold up a look at the store.
_CHECKS_PER_LOOK = 100


@dataclass(frozen=True)
class Rejection:
    """Why a version was rejected. `stamps` are those of its files then; `None` where only its manifest counts.

    That is so once its files have been proven to be what the manifest says: other files could only be worse, and those of
    a version with the same weights are the same files, whose times change when they are published again.
    """

    reason: Reason
    detail: str
    manifest_stamp: str | None
    stamps: Stamps | None
    check_at: float
    pause_s: float

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Setback:
    """Why a version could not be loaded just now, and when it is tried again: not as long as its last try hangs."""

    why: str
    manifest_stamp: str | None
    pause_s: float
    retry_at: float
    hangs: Callable[[], bool] = lambda: False


class Quarantine:
    """The rejected versions and the setbacks of one store, by number and by the stamp of the manifest there."""

    def __init__(self, *, poll_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Look at rejected versions again after `poll_s` seconds at first. The clock's readings are in seconds."""
        self._poll_s = poll_s
        self._clock = clock
        self.rejections: dict[int, Rejection] = {}
        self.setbacks: dict[int, Setback] = {}

    def reject(self, version: int, error: BadVersion, manifest_stamp: str | None, stamps: Stamps | None) -> None:
        """Keep a version out until its bytes change."""
        self.setbacks.pop(version, None)
        check_at = self._clock() + self._poll_s
        self.rejections[version] = Rejection(
            error.reason, shorten(error.detail), manifest_stamp, stamps, check_at, self._poll_s
        )

    def set_back(
        self, version: int, why: str, manifest_stamp: str | None, *, hangs: Callable[[], bool] | None = None
    ) -> None:
        """Keep a version out for a while, twice as long as the last time, and as long as `hangs` says so."""
        before = self.setbacks.get(version)
        pause_s = min(2 * before.pause_s, _LAST_RETRY_S) if before else _FIRST_RETRY_S
        setback = Setback(shorten(why), manifest_stamp, pause_s, self._clock() + pause_s)
        self.setbacks[version] = replace(setback, hangs=hangs) if hangs else setback

    def release(self, version: int) -> None:
        """Forget why a version was kept out."""
        self.rejections.pop(version, None)
        self.setbacks.pop(version, None)

    def compare(self, manifest_stamps: Mapping[int, str]) -> None:
        """Release every version whose manifest is gone or another one."""
        kept_out: dict[int, Rejection | Setback] = {**self.rejections, **self.setbacks}
        for version, entry in kept_out.items():
            stamp = manifest_stamps.get(version)
            if entry.manifest_stamp is None and stamp is not None:
                self._adopt(version, stamp)
            elif stamp != entry.manifest_stamp:
                self.release(version)

    def to_check(self, *, above: int, thorough: bool) -> list[int]:
        """Return the rejected versions whose files are to be looked at now.

        Args:
            above: only versions above this number could go live.
            thorough: look at all of them, whatever their turn.
        """
        if thorough:
            return [version for version, rejection in self.rejections.items() if rejection.stamps is not None]
        now = self._clock()
        due = [
            v for v, each in self.rejections.items() if v > above and each.stamps is not None and each.check_at <= now
        ]
        return sorted(due, key=lambda version: self.rejections[version].check_at)[:_CHECKS_PER_LOOK]

    def checked(self, version: int, stamps: Stamps) -> bool:
        """Compare a rejected version's files with what they were. Releases it and returns true when they differ."""
        rejection = self.rejections.get(version)
        if rejection is None or rejection.stamps is None:
            return False
        if stamps != rejection.stamps:
            self.release(version)
            return True
        pause_s = min(2 * rejection.pause_s, _LAST_CHECK_S)
        self.rejections[version] = replace(rejection, stamps=stamps, check_at=self._clock() + pause_s, pause_s=pause_s)
        return False

    def waiting(self) -> frozenset[int]:
        """Return the versions whose next try is still to come."""
        now = self._clock()
        return frozenset(v for v, setback in self.setbacks.items() if setback.retry_at > now or setback.hangs())

    def hasten(self) -> None:
        """Let everything that failed for now be tried at once, except what hangs."""
        self.setbacks = {v: replace(setback, retry_at=self._clock()) for v, setback in self.setbacks.items()}

    def next_retry_s(self, *, above: int, pinned: int | None) -> float | None:
        """Return the seconds until a version is to be tried again that could go live; `None` when there is none."""
        times = [
            setback.retry_at
            for version, setback in self.setbacks.items()
            if (version > above if pinned is None else version == pinned) and not setback.hangs()
        ]
        return max(0.0, min(times) - self._clock()) if times else None

    def why(self, version: int) -> str | None:
        """Return why a version is kept out, in words; `None` when it is not."""
        if rejection := self.rejections.get(version):
            return str(rejection)
        setback = self.setbacks.get(version)
        return setback.why if setback else None

    def _adopt(self, version: int, manifest_stamp: str) -> None:
        if rejection := self.rejections.get(version):
            self.rejections[version] = replace(rejection, manifest_stamp=manifest_stamp)
        if setback := self.setbacks.get(version):
            self.setbacks[version] = replace(setback, manifest_stamp=manifest_stamp)
