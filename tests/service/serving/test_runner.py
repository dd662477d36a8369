"""The runner: jobs on a thread that may be left behind."""

import asyncio
import threading
import time

import pytest

from service.serving.runner import Runner


def test_jobs_run_one_after_another_on_one_thread() -> None:
    """Each job's result comes back, and all of them ran on the same thread, which is not the caller's."""

    async def run() -> set[int]:
        runner = Runner("test")
        idents = await asyncio.gather(*(runner.run(threading.get_ident) for _ in range(5)))
        runner.end(wait_s=10)
        return set(idents)

    idents = asyncio.run(run())
    assert len(idents) == 1
    assert threading.get_ident() not in idents


def test_a_runner_without_jobs_has_no_thread() -> None:
    """A runner that is never used starts nothing, and can be ended."""
    before = threading.active_count()
    Runner("test").end(wait_s=10)
    assert threading.active_count() == before


def test_what_a_job_raises_comes_back() -> None:
    """An error reaches who asked, and the next job runs."""

    def fail() -> None:
        raise ValueError("no")

    async def run() -> str:
        runner = Runner("test")
        with pytest.raises(ValueError, match="no"):
            await runner.run(fail)
        result = await runner.run(lambda: "next")
        runner.end(wait_s=10)
        return result

    assert asyncio.run(run()) == "next"


def test_a_job_that_hangs_is_left_behind() -> None:
    """Ending a runner waits no longer than told, and the thread ends by itself once its job does."""
    over = threading.Event()

    async def run() -> threading.Thread:
        runner = Runner("test")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await runner.run(lambda: over.wait(30))
        began = time.monotonic()
        runner.end(wait_s=0.05)
        assert time.monotonic() - began < 5
        return runner._thread

    thread = asyncio.run(run())
    assert thread.is_alive()
    assert thread.daemon
    over.set()
    thread.join(10)
    assert not thread.is_alive()
