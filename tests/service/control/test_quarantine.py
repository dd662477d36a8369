"""The quarantine: what is kept out of service, for how long, and when it is looked at again."""

import itertools

import pytest

from emaswap import BadVersion, Reason
from service.control.quarantine import Quarantine
from service.refusal import MAX_DETAIL

BAD = BadVersion(Reason.DIGEST_MISMATCH, "expected this, got that")


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return Clock()


@pytest.fixture
def quarantine(clock: Clock) -> Quarantine:
    """An empty quarantine that looks at rejected versions after a second."""
    return Quarantine(poll_s=1.0, clock=clock)


def test_a_rejected_version_is_kept_out_while_its_files_are_what_they_were(quarantine: Quarantine) -> None:
    """Equal stamps change nothing, however often they are compared."""
    quarantine.reject(3, BAD, "m", {"weights": "w"})
    for _ in range(5):
        quarantine.compare({3: "m"})
        assert not quarantine.checked(3, {"weights": "w"})
    assert quarantine.why(3) == "digest_mismatch: expected this, got that"


def test_a_rejected_version_whose_files_change_is_released(quarantine: Quarantine) -> None:
    """Another stamp of any file means other bytes, which deserve another try."""
    quarantine.reject(3, BAD, "m", {"weights": "w", "probe": None})
    assert quarantine.checked(3, {"weights": "w", "probe": "p"})
    assert quarantine.why(3) is None


@pytest.mark.parametrize("there", [{3: "another"}, {}], ids=["another manifest", "no manifest"])
def test_a_number_with_another_manifest_is_another_version(quarantine: Quarantine, there: dict[int, str]) -> None:
    """What was rejected or failed under a number says nothing about the version that has it now."""
    quarantine.reject(3, BAD, "m", {})
    quarantine.compare(there)
    assert quarantine.why(3) is None
    quarantine.set_back(3, "out of memory", "m")
    quarantine.compare(there)
    assert quarantine.why(3) is None


def test_a_version_whose_files_were_proven_is_let_in_again_by_another_manifest_alone(quarantine: Quarantine) -> None:
    """Its files are not looked at: publishing the same weights again changes their times, and nothing else."""
    quarantine.reject(3, BAD, None, None)
    quarantine.compare({3: "m"})
    assert quarantine.to_check(above=0, thorough=True) == []
    for weights in ("w", "other"):
        assert not quarantine.checked(3, {"weights": weights})
    quarantine.compare({3: "another"})
    assert not quarantine.rejections


def test_a_rejected_version_is_looked_at_ever_more_seldom(quarantine: Quarantine, clock: Clock) -> None:
    """The time between two looks doubles, and ends at five minutes."""
    quarantine.reject(3, BAD, "m", {})
    looks = []
    for second in range(4000):
        clock.now_s = 1000.0 + second
        if quarantine.to_check(above=0, thorough=False):
            looks.append(second)
            quarantine.checked(3, {})
    pauses = [after - before for before, after in itertools.pairwise(looks)]
    assert looks[0] == 1
    assert pauses[:5] == [2, 4, 8, 16, 32]
    assert max(pauses) == pauses[-1] == 300


def test_only_versions_that_could_go_live_are_looked_at(quarantine: Quarantine, clock: Clock) -> None:
    """Rejected versions below the live one cost nothing, unless somebody asks for a thorough look."""
    for version in (1, 2, 8, 9):
        quarantine.reject(version, BAD, "m", {})
    clock.now_s += 10
    assert quarantine.to_check(above=5, thorough=False) == [8, 9]
    assert quarantine.to_check(above=5, thorough=True) == [1, 2, 8, 9]


def test_a_look_compares_a_bounded_number_of_versions(quarantine: Quarantine, clock: Clock) -> None:
    """Of ten thousand rejected versions a look takes a hundred, and in time all of them."""
    for version in range(1, 10_001):
        quarantine.reject(version, BAD, "m", {})
    clock.now_s += 10
    seen: set[int] = set()
    for _ in range(100):
        due = quarantine.to_check(above=0, thorough=False)
        assert len(due) == 100
        seen.update(due)
        for version in due:
            quarantine.checked(version, {})
    assert len(seen) == 10_000


def test_what_failed_for_now_waits_twice_as_long_each_time(quarantine: Quarantine, clock: Clock) -> None:
    """The first retry comes after a quarter of a second, and no two are more than a minute apart."""
    pauses = []
    for _ in range(12):
        quarantine.set_back(3, "out of memory", "m")
        assert quarantine.waiting() == {3}
        pause_s = quarantine.next_retry_s(above=0, pinned=None)
        assert pause_s is not None
        pauses.append(pause_s)
        clock.now_s += pause_s
        assert quarantine.waiting() == frozenset()
    assert pauses == [0.25, 0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_what_hangs_waits_until_it_has_ended(quarantine: Quarantine, clock: Clock) -> None:
    """A version is not tried again as long as its last try hangs, not even by a thorough look."""
    hanging = [True]
    quarantine.set_back(3, "not done", "m", hangs=lambda: hanging[0])
    clock.now_s += 1000
    quarantine.hasten()
    assert quarantine.waiting() == {3}
    assert quarantine.next_retry_s(above=0, pinned=None) is None
    hanging[0] = False
    assert quarantine.waiting() == frozenset()


def test_only_retries_of_what_could_go_live_are_waited_for(quarantine: Quarantine) -> None:
    """A setback of a version below the live one, or of one that is not pinned, wakes nobody."""
    quarantine.set_back(3, "out of memory", "m")
    assert quarantine.next_retry_s(above=0, pinned=None) == 0.25
    assert quarantine.next_retry_s(above=3, pinned=None) is None
    assert quarantine.next_retry_s(above=0, pinned=4) is None
    assert quarantine.next_retry_s(above=9, pinned=3) == 0.25


def test_a_thorough_look_retries_at_once(quarantine: Quarantine) -> None:
    """An operator who asks does not wait for the next retry."""
    quarantine.set_back(3, "out of memory", "m")
    quarantine.hasten()
    assert quarantine.waiting() == frozenset()


def test_long_explanations_are_cut() -> None:
    """Twenty megabytes of detail in each rejection do not stay in memory."""
    quarantine = Quarantine(poll_s=1.0)
    detail = "x" * (20 << 20)
    quarantine.reject(1, BadVersion(Reason.PROBE_FAILED, detail), "m", {})
    quarantine.set_back(2, detail, "m")
    assert len(quarantine.why(1) or "") <= MAX_DETAIL + 100
    assert len(quarantine.why(2) or "") <= MAX_DETAIL
