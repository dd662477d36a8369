"""The states a version goes through in the service, and the record of where each one is.

discovered → fetching → verifying → warming → live → previous → retired
                 └─────────┴───────────┴──▶ rejected
"""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum

from emaswap import Reason

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


@dataclass(frozen=True)
class Record:
    """One version: its state, since when, why it was rejected, and how long each stage took in seconds."""

    version: int
    state: State = State.DISCOVERED
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    digest: str | None = None
    step: int | None = None
    reason: Reason | None = None
    detail: str | None = None
    timings_s: dict[str, float] = field(default_factory=dict)


class History:
    """The records of the newest versions. Records are replaced whole, so any thread may read or write."""

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}

    def discover(self, versions: tuple[int, ...]) -> None:
        """Note versions found in the store, and forget the oldest beyond what is remembered."""
        for version in versions[-_REMEMBERED:]:
            self._records.setdefault(version, Record(version))
        for version in sorted(self._records)[:-_REMEMBERED]:
            if self._records[version].state not in (State.LIVE, State.PREVIOUS):
                del self._records[version]

    def enter(
        self,
        version: int,
        state: State,
        *,
        digest: str | None = None,
        step: int | None = None,
        reason: Reason | None = None,
        detail: str | None = None,
        timings_s: dict[str, float] | None = None,
    ) -> None:
        """A version enters a state. What was known of it and is not given anew stays, except why it was rejected."""
        was = self._records.get(version, Record(version))
        self._records[version] = replace(
            was,
            state=state,
            since=datetime.now(UTC),
            digest=digest or was.digest,
            step=was.step if step is None else step,
            reason=reason,
            detail=detail,
            timings_s=timings_s or was.timings_s,
        )

    def get(self, version: int) -> Record | None:
        """The record of one version."""
        return self._records.get(version)

    def newest_first(self) -> list[Record]:
        """All records, the highest version first."""
        return sorted(self._records.copy().values(), key=lambda record: record.version, reverse=True)
