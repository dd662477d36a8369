"""Log lines that come too often."""

from service.logs import Seldom


def test_one_line_a_period_and_the_others_are_counted() -> None:
    """The first line of each period goes through, and tells how many did not since the last."""
    now = 0.0
    seldom = Seldom(10.0, clock=lambda: now)
    assert seldom.skipped() == 0
    assert [seldom.skipped() for _ in range(5)] == [None] * 5
    now = 9.99
    assert seldom.skipped() is None
    now = 10.0
    assert seldom.skipped() == 6
    now = 20.0
    assert seldom.skipped() == 0
