"""Lanes: blocking work off the event loop, which can be given up."""

import asyncio
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from service.control.lane import Blocked, Hung, Lane
from tests.serving import wait_for


@pytest.fixture
def lane() -> Iterator[Lane]:
    """A lane on which two pieces of work may hang."""
    lane = Lane("test-lane", most_hung=2)
    yield lane
    lane.close()


class Weights:
    """Something large."""


def test_work_runs_on_one_other_thread(lane: Lane) -> None:
    """Results come back, and all work shares one thread that is not the event loop's."""

    async def main() -> list[int]:
        return [await lane.run(threading.get_ident, 30) for _ in range(3)]

    (ident,) = set(asyncio.run(main()))
    assert ident != threading.get_ident()


@pytest.mark.parametrize("error", [ValueError("no"), TimeoutError("of the work's own"), MemoryError()])
def test_errors_come_back(lane: Lane, error: Exception) -> None:
    """What the work raises is raised where it is waited for, and the lane goes on."""

    def fail() -> None:
        raise error

    async def main() -> int:
        with pytest.raises(type(error)):
            await lane.run(fail, 30)
        return await lane.run(lambda: 5, 30)

    assert asyncio.run(main()) == 5


@pytest.mark.parametrize("ending", [SystemExit, KeyboardInterrupt, StopIteration, asyncio.CancelledError])
def test_work_cannot_end_the_event_loop(lane: Lane, ending: type[BaseException]) -> None:
    """What would end a program or a coroutine comes back as an ordinary error."""

    def end() -> None:
        raise ending

    async def main() -> None:
        with pytest.raises(RuntimeError, match=ending.__name__):
            await lane.run(end, 30)

    asyncio.run(main())


def test_errors_keep_nothing_alive(lane: Lane) -> None:
    """The frames of an error let go of what they held, so that a failed load frees its weights."""
    held: list[weakref.ref[Weights]] = []

    def fail() -> None:
        weights = Weights()
        held.append(weakref.ref(weights))
        raise ValueError

    async def main() -> None:
        try:
            await lane.run(fail, 30)
        except ValueError:
            assert held[0]() is None

    asyncio.run(main())


def test_work_that_takes_too_long_is_given_up_and_the_next_runs(lane: Lane) -> None:
    """The lane has another thread at once; the work that hangs is told apart from what has ended."""
    end = threading.Event()

    async def main() -> Hung:
        with pytest.raises(Hung, match=r"not done within 0\.05 s") as caught:
            await lane.run(lambda: end.wait(30), 0.05)
        assert lane.hung == 1
        assert await lane.run(lambda: 5, 30) == 5
        return caught.value

    hung = asyncio.run(main())
    assert hung.hangs()
    end.set()
    wait_for(lambda: not hung.hangs(), what="the end of the work")
    assert lane.hung == 0


def test_no_more_threads_are_left_behind_than_may_hang(lane: Lane) -> None:
    """When too many pieces of work hang, further ones are refused until one of them ends."""
    end = threading.Event()

    async def main() -> None:
        for _ in range(2):
            with pytest.raises(Hung):
                await lane.run(lambda: end.wait(30), 0.01)
        with pytest.raises(Blocked, match="2 attempts that were given up still hang"):
            await lane.run(lambda: 5, 30)
        end.set()
        await asyncio.to_thread(wait_for, lambda: lane.hung == 0)
        assert await lane.run(lambda: 5, 30) == 5

    asyncio.run(main())


def test_work_whose_caller_has_gone_is_given_up(lane: Lane) -> None:
    """When the coroutine that waits is cancelled, the next work does not wait behind what it began."""
    end = threading.Event()

    async def main() -> None:
        waiting = asyncio.create_task(lane.run(lambda: end.wait(30), 30))
        await asyncio.sleep(0.01)
        waiting.cancel()
        began = time.monotonic()
        assert await lane.run(lambda: 5, 30) == 5
        assert time.monotonic() - began < 10
        end.set()

    asyncio.run(main())


def test_an_idle_lane_keeps_no_result_alive(lane: Lane) -> None:
    """What a piece of work returned belongs to whoever asked for it alone."""

    async def main() -> None:
        weights = await lane.run(Weights, 30)
        gone = weakref.ref(weights)
        del weights
        await asyncio.sleep(0)
        wait_for(lambda: gone() is None, what="the result freed")

    asyncio.run(main())
