"""The history: what the service remembers of each version, and the steps that a version may take."""

import itertools

import pytest

from emaswap import Identity, Reason
from service.control.lifecycle import FOLLOWING, History, IllegalStep, State, unread
from service.refusal import MAX_DETAIL

A, B = "blake3:" + "a" * 64, "blake3:" + "b" * 64
# The quickest way into each state.
WAYS = {
    State.DISCOVERED: (),
    State.FETCHING: (State.FETCHING,),
    State.VERIFYING: (State.FETCHING, State.VERIFYING),
    State.WARMING: (State.FETCHING, State.VERIFYING, State.WARMING),
    State.LIVE: (State.FETCHING, State.VERIFYING, State.WARMING, State.LIVE),
    State.PREVIOUS: (State.FETCHING, State.VERIFYING, State.WARMING, State.LIVE, State.PREVIOUS),
    State.RETIRED: (State.FETCHING, State.VERIFYING, State.WARMING, State.LIVE, State.PREVIOUS, State.RETIRED),
    State.REJECTED: (State.REJECTED,),
}


def stamps(*versions: int, stamp: str = "first") -> dict[int, str]:
    """The stamps of manifests that were written once."""
    return dict.fromkeys(versions, stamp)


def bring(history: History, identity: Identity, state: State) -> None:
    """Take a version into a state, step by step."""
    history.identify(identity, "first")
    for step in WAYS[state]:
        history.enter(identity, step)


def states(history: History) -> list[tuple[int, str, State]]:
    """What the history shows, in its order."""
    return [(record.version, record.identity.digest, record.state) for record in history.newest_first()]


def test_discovered_versions_are_listed_newest_first() -> None:
    """Every discovered version has a record, and the newest one comes first."""
    history = History()
    history.discover(stamps(1, 2, 5))
    assert states(history) == [(version, "", State.DISCOVERED) for version in (5, 2, 1)]


def test_discovering_again_changes_nothing() -> None:
    """A version that is found in the store once more keeps the state it has."""
    history = History()
    history.discover(stamps(1))
    history.enter(unread(1), State.REJECTED, reason=Reason.NOT_FINITE, detail="w")
    before = history.get(unread(1))
    history.discover(stamps(1))
    assert history.get(unread(1)) is before


@pytest.mark.parametrize(("before", "after"), list(itertools.product(State, State)))
def test_only_the_steps_of_the_table_are_taken(before: State, after: State) -> None:
    """A step that is not in the table raises and changes nothing; one that is in it is noted."""
    history = History()
    bring(history, Identity(1, A), before)
    record = history.get(Identity(1, A))
    assert record is not None
    assert record.state is before
    if after in FOLLOWING[before]:
        history.enter(Identity(1, A), after)
        record = history.get(Identity(1, A))
        assert record is not None
        assert record.state is after
    else:
        with pytest.raises(IllegalStep, match=f"version 1 is {before} and cannot become {after}"):
            history.enter(Identity(1, A), after)
        assert history.get(Identity(1, A)) is record


def test_memory_is_bounded() -> None:
    """However many versions go by, only some hundreds are remembered, and they are the newest."""
    history = History()
    for newest in range(1, 2000):
        history.discover(stamps(newest))
        bring(history, Identity(newest, A), State.RETIRED)
    records = history.newest_first()
    assert len(records) <= 300
    assert [record.version for record in records] == list(range(1999, 1999 - len(records), -1))


def test_a_store_of_very_many_versions_is_not_remembered_whole() -> None:
    """A long listing leaves the newest of it in memory."""
    history = History()
    history.discover(stamps(*range(1, 100_000)))
    assert len(history.newest_first()) <= 300
    assert history.newest_first()[0].version == 99_999


@pytest.mark.parametrize("state", [State.LIVE, State.PREVIOUS])
def test_what_still_answers_is_never_forgotten(state: State) -> None:
    """A version that is live, or still finishes requests, stays known however many newer ones there are."""
    history = History()
    bring(history, Identity(1, A), state)
    history.discover(stamps(*range(2, 5000)))
    history.discover(stamps(*range(5000, 9000)))
    record = history.get(Identity(1, A))
    assert record is not None
    assert record.state is state


def test_a_long_detail_is_cut() -> None:
    """A rejection with megabytes of detail keeps its beginning and its end, and not all of the rest."""
    history = History()
    history.enter(unread(1), State.REJECTED, detail="begin" + "x" * (20 << 20) + "end")
    record = history.get(unread(1))
    assert record is not None
    assert record.detail is not None
    assert len(record.detail) <= MAX_DETAIL
    assert record.detail.startswith("begin")
    assert record.detail.endswith("end")


def test_a_reason_is_cleared_when_the_version_is_tried_again() -> None:
    """A version that is tried again no longer shows why it was rejected before."""
    history = History()
    history.enter(unread(3), State.REJECTED, reason=Reason.DIGEST_MISMATCH, detail="expected this, got that")
    history.enter(unread(3), State.DISCOVERED)
    record = history.get(unread(3))
    assert record is not None
    assert (record.state, record.reason, record.detail) == (State.DISCOVERED, None, None)


def test_what_is_known_of_a_version_stays_with_it() -> None:
    """Digest, step (even 0) and timings stay until they are given anew, and the time of entry moves on."""
    history = History()
    history.identify(Identity(3, A), "first", digest=B, step=0)
    first = history.get(Identity(3, A))
    for state in WAYS[State.WARMING]:
        history.enter(Identity(3, A), state)
    history.enter(Identity(3, A), State.LIVE, timings_s={"fetching": 0.5})
    history.enter(Identity(3, A), State.PREVIOUS)
    record = history.get(Identity(3, A))
    assert first is not None
    assert record is not None
    assert (record.digest, record.step, record.timings_s) == (B, 0, {"fetching": 0.5})
    assert record.since >= first.since


def test_an_unknown_version_has_no_record() -> None:
    """Asking for a version that never was gives nothing."""
    assert History().get(unread(7)) is None


@pytest.mark.parametrize("state", [State.RETIRED, State.REJECTED, State.DISCOVERED])
def test_a_number_with_another_manifest_is_another_version(state: State) -> None:
    """What was known of a number is forgotten when another version has it."""
    history = History()
    bring(history, Identity(3, A), state)
    history.discover(stamps(3, stamp="second"))
    assert states(history) == [(3, "", State.DISCOVERED)]
    history.identify(Identity(3, B), "second")
    assert states(history) == [(3, B, State.DISCOVERED)]


def test_the_version_that_had_a_number_stays_known_while_it_answers() -> None:
    """The new holder of a number comes first; the old one is shown until its last request has ended."""
    history = History()
    bring(history, Identity(3, A), State.LIVE)
    history.discover(stamps(3, stamp="second"))
    assert states(history) == [(3, "", State.DISCOVERED), (3, A, State.LIVE)]
    history.identify(Identity(3, B), "second")
    for state in WAYS[State.WARMING]:
        history.enter(Identity(3, B), state)
    history.enter(Identity(3, A), State.PREVIOUS)
    history.enter(Identity(3, B), State.LIVE)
    assert states(history) == [(3, B, State.LIVE), (3, A, State.PREVIOUS)]
    history.enter(Identity(3, A), State.RETIRED)
    assert states(history) == [(3, B, State.LIVE)]


def test_a_manifest_that_was_only_written_again_is_the_same_version() -> None:
    """Another stamp of the same manifest makes no other version of it, once the manifest was read."""
    history = History()
    bring(history, Identity(3, A), State.LIVE)
    history.restamp(Identity(3, A), "second")
    history.discover(stamps(3, stamp="second"))
    assert states(history) == [(3, A, State.LIVE)]
