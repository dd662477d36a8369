"""The history: what the service remembers of each version."""

import pytest

from emaswap import Reason
from service.control.lifecycle import History, State


def test_discovered_versions_are_listed_newest_first() -> None:
    """Every discovered version has a record, and the newest one comes first."""
    history = History()
    history.discover((1, 2, 5))
    assert [(record.version, record.state) for record in history.newest_first()] == [
        (5, State.DISCOVERED),
        (2, State.DISCOVERED),
        (1, State.DISCOVERED),
    ]


def test_discovering_again_changes_nothing() -> None:
    """A version that is found in the store once more keeps the state it has."""
    history = History()
    history.enter(1, State.REJECTED, reason=Reason.NOT_FINITE, detail="w")
    before = history.get(1)
    history.discover((1,))
    assert history.get(1) is before


def test_memory_is_bounded() -> None:
    """However many versions go by, only some hundreds are remembered, and they are the newest."""
    history = History()
    for newest in range(1, 2000):
        history.discover((newest,))
        history.enter(newest, State.RETIRED)
    records = history.newest_first()
    assert len(records) <= 300
    assert [record.version for record in records] == list(range(1999, 1999 - len(records), -1))


def test_a_store_of_very_many_versions_is_not_remembered_whole() -> None:
    """A long listing leaves the newest of it in memory."""
    history = History()
    history.discover(tuple(range(1, 100_000)))
    assert len(history.newest_first()) <= 300
    assert history.newest_first()[0].version == 99_999


@pytest.mark.parametrize("state", [State.LIVE, State.PREVIOUS])
def test_what_still_answers_is_never_forgotten(state: State) -> None:
    """A version that is live, or still finishes requests, stays known however many newer ones there are."""
    history = History()
    history.enter(1, state)
    history.discover(tuple(range(2, 5000)))
    history.discover(tuple(range(5000, 9000)))
    record = history.get(1)
    assert record is not None
    assert record.state is state


def test_a_reason_is_cleared_when_the_version_goes_on() -> None:
    """A version that is tried again no longer shows why it was rejected before."""
    history = History()
    history.enter(3, State.REJECTED, reason=Reason.DIGEST_MISMATCH, detail="expected this, got that")
    history.enter(3, State.DISCOVERED)
    record = history.get(3)
    assert record is not None
    assert (record.state, record.reason, record.detail) == (State.DISCOVERED, None, None)


def test_what_is_known_of_a_version_stays_with_it() -> None:
    """Digest, step (even 0) and timings stay until they are given anew, and the time of entry moves on."""
    history = History()
    history.enter(3, State.DISCOVERED, digest="blake3:00", step=0)
    first = history.get(3)
    history.enter(3, State.LIVE, timings_s={"fetching": 0.5})
    history.enter(3, State.PREVIOUS)
    record = history.get(3)
    assert first is not None
    assert record is not None
    assert (record.digest, record.step, record.timings_s) == ("blake3:00", 0, {"fetching": 0.5})
    assert record.since >= first.since


def test_an_unknown_version_has_no_record() -> None:
    """Asking for a version that never was gives nothing."""
    assert History().get(7) is None
