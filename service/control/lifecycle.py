"""The states a version goes through in the service, and the record of where each one is.

    discovered → fetching → verifying → warming → live → previous → retired
         ↑          └─────────┴───────────┴────────┴────────┴─────────┴──▶ rejected
         └── from fetching, verifying, warming: failed for now, tried again later
         └── from previous, retired: wanted again (previous: live at once where the live one has failed)
         └── from rejected: its bytes have changed, or an operator overruled the reason

Only these steps are legal; any other is a mistake in our code and raises.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum

from emaswap import Identity, Reason
from service.refusal import shorten

_REMEMBERED = 200


class State(StrEnum):
    """Where a version is in its life. `previous` still finishes requests; `retired` has been freed."""

    DISCOVERED = "discovered"
    FETCHING = "fetching"
    VERIFYING = "verifying"
    WARMING = "warming"
    LIVE = "live"
    PREVIOUS = "previous"
    RETIRED = "retired"
    REJECTED = "rejected"


FOLLOWING = {
    State.DISCOVERED: {State.FETCHING, State.REJECTED},
    State.FETCHING: {State.VERIFYING, State.REJECTED, State.DISCOVERED},
    State.VERIFYING: {State.WARMING, State.REJECTED, State.DISCOVERED},
    State.WARMING: {State.LIVE, State.REJECTED, State.DISCOVERED},
    State.LIVE: {State.PREVIOUS, State.REJECTED},
    State.PREVIOUS: {State.RETIRED, State.REJECTED, State.DISCOVERED, State.LIVE},
    State.RETIRED: {State.DISCOVERED, State.REJECTED},
    State.REJECTED: {State.DISCOVERED},
}
"""The states that may follow each state."""

LOADING = frozenset({State.FETCHING, State.VERIFYING, State.WARMING})
"""The states of a version that is being loaded."""

_ANSWERING = (State.LIVE, State.PREVIOUS)


class IllegalStep(RuntimeError):
    """A version was to enter a state that cannot follow the one it is in."""


def unread(version: int) -> Identity:
    """Return what stands for a version's identity until its manifest could be read."""
    return Identity(version, "")


@dataclass(frozen=True)
class Record:
    """One version: its state, since when, why it was rejected, and how long each stage took in seconds.

    `digest` is that of its weights, `stamp` changes when the bytes of its manifest may have.
    """

    identity: Identity
    state: State = State.DISCOVERED
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    digest: str | None = None
    step: int | None = None
    reason: Reason | None = None
    detail: str | None = None
    timings_s: Mapping[str, float] = field(default_factory=dict)
    stamp: str | None = None

    @property
    def version(self) -> int:
        """The version's number."""
        return self.identity.version


class History:
    """The records of the newest versions, by identity. Only one thread may write: the event loop's."""

    def __init__(self) -> None:
        self._records: dict[Identity, Record] = {}
        self._holders: dict[int, Identity] = {}

    def discover(self, stamps: Mapping[int, str]) -> None:
        """Note the versions in the store, each with the stamp of its manifest, in ascending order.

        A number with another stamp than before belongs to another version until its manifest has been read. The oldest
        records beyond what is remembered are forgotten.
        """
        for version in list(stamps)[-_REMEMBERED:]:
            holder = self._holders.get(version)
            if holder is None or self._records[holder].stamp != stamps[version]:
                self._hand_over(unread(version), Record(unread(version), stamp=stamps[version]))
        oldest_first = sorted(self._records.values(), key=lambda record: (record.version, record.since))
        for record in oldest_first[:-_REMEMBERED]:
            if record.state not in _ANSWERING:
                self._forget(record.identity)

    def identify(
        self, identity: Identity, stamp: str | None, *, digest: str | None = None, step: int | None = None
    ) -> None:
        """Note whose number this is, and what its manifest says. A version that was known comes back to `discovered`."""
        was = self._records.get(identity, Record(identity))
        self._hand_over(identity, replace(was, stamp=stamp, digest=digest or was.digest, step=step))
        if was.state is not State.DISCOVERED:
            self.enter(identity, State.DISCOVERED)

    def restamp(self, identity: Identity, stamp: str) -> None:
        """Note that a version's manifest has another stamp, although it is the same."""
        if record := self._records.get(identity):
            self._records[identity] = replace(record, stamp=stamp)

    def enter(
        self,
        identity: Identity,
        state: State,
        *,
        reason: Reason | None = None,
        detail: str | None = None,
        timings_s: Mapping[str, float] | None = None,
    ) -> None:
        """Note that a version enters a state; a long `detail` is cut. Raises `IllegalStep`."""
        was = self._records.get(identity, Record(identity))
        if state not in FOLLOWING[was.state]:
            raise IllegalStep(f"version {identity.version} is {was.state} and cannot become {state}")
        self._records[identity] = replace(
            was,
            state=state,
            since=datetime.now(UTC),
            reason=reason,
            detail=None if detail is None else shorten(detail),
            timings_s=was.timings_s if timings_s is None else dict(timings_s),
        )
        if self._holders.setdefault(identity.version, identity) != identity and state not in _ANSWERING:
            self._forget(identity)

    def holder(self, version: int) -> Identity:
        """Return the identity of the version that has this number now."""
        return self._holders.get(version, unread(version))

    def get(self, identity: Identity) -> Record | None:
        """Return the record of one version."""
        return self._records.get(identity)

    def newest_first(self) -> tuple[Record, ...]:
        """Return all records, the highest number first; of one number, the version that has it now first."""
        held = set(self._holders.values())
        return tuple(
            sorted(self._records.values(), key=lambda record: (record.version, record.identity in held), reverse=True)
        )

    def _hand_over(self, identity: Identity, record: Record) -> None:
        """Give a number to a version. The one that had it is forgotten, unless it still answers."""
        before = self._holders.get(identity.version)
        if before is not None and before != identity and self._records[before].state not in _ANSWERING:
            del self._records[before]
        self._holders[identity.version] = identity
        self._records[identity] = record

    def _forget(self, identity: Identity) -> None:
        del self._records[identity]
        if self._holders.get(identity.version) == identity:
            del self._holders[identity.version]
