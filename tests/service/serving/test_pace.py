"""The pace of a model: the size of its batches, and where they run, from measured times."""

import pytest

from service.serving.pace import Pace


def fed(per_row_us: dict[int, float], *, times: int = 20, most: int = 512) -> Pace:
    """A pace that has seen batches of these sizes, each taking so many microseconds a row."""
    pace = Pace(most)
    for _ in range(times):
        for rows, microseconds in per_row_us.items():
            pace.note(rows, rows * microseconds * 1e-6)
    return pace


@pytest.mark.parametrize(
    ("per_row_us", "limit"),
    [
        pytest.param({}, 512, id="nothing known"),
        pytest.param({1: 100, 8: 50, 64: 20}, 512, id="the larger the better"),
        pytest.param({1: 900, 16: 300, 32: 216, 64: 286}, 32, id="best in the middle"),
        pytest.param({1: 900, 16: 300, 32: 216, 64: 220}, 512, id="as good as the best"),
        pytest.param({1: 900, 8: 200, 64: 300}, 16, id="what lies between is tried"),
        pytest.param({1: 10, 2: 20, 4: 40}, 1, id="one at a time"),
    ],
)
def test_batches_are_as_large_as_pays(per_row_us: dict[int, float], limit: int) -> None:
    """Larger batches than the best are not made once they are known to be slower a row."""
    assert fed(per_row_us, times=21).limit == limit


def test_what_was_slow_is_tried_again() -> None:
    """A size that was slow while the machine had other work is found again when it is quick."""
    pace = fed({16: 300, 32: 216, 64: 400})
    limits = []
    for _ in range(12_000):
        limits.append(rows := min(pace.limit, 64))
        pace.note(rows, rows * (100 if rows == 64 else 216) * 1e-6)
    assert limits[0] == 32
    assert limits.count(64) < len(limits) or limits[-1] == 64
    assert pace.limit == 512


def test_one_slow_batch_changes_nothing() -> None:
    """A batch that was interrupted by something else does not make its size a bad one."""
    pace = fed({1: 100, 16: 40, 64: 30})
    pace.note(64, 5.0)
    assert pace.limit == 512
    assert pace.is_quick(1)


def test_a_model_that_has_become_slow_blocks_the_event_loop_once() -> None:
    """A version that is much slower than the one before is not waited for until the average has followed."""
    pace = fed({1: 50})
    for _ in range(30):
        pace.note(1, 1.0)
        assert not pace.is_quick(1)


def test_only_what_is_known_to_be_quick_may_run_on_the_event_loop() -> None:
    """An unknown size is not quick; one that was is not any more when it becomes slow."""
    pace = fed({1: 50, 64: 30})
    assert pace.is_quick(1)
    assert not pace.is_quick(8)
    assert not pace.is_quick(64)
    for _ in range(100):
        pace.note(1, 3e-3)
    assert not pace.is_quick(1)
    pace.forget()
    assert not pace.is_quick(1)
    assert pace.limit == 512
