"""Timing: several works in turn, so that a slow spell of the machine meets all of them."""

import time
from collections.abc import Callable
from statistics import median


def interleaved(rounds: int, *works: Callable[[], object]) -> list[float]:
    """The median seconds of each work, after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in works]
    for counts in [False] + [True] * rounds:
        for work, times in zip(works, seconds, strict=True):
            began = time.perf_counter()
            work()
            if counts:
                times.append(time.perf_counter() - began)
    return [median(times) for times in seconds]
