"""What a swap costs those who ask: 100 MB of new weights every second, against none, at half of what the service can."""

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from rich.progress import track

from benchmarks.models import Wide
from benchmarks.open_loop import Answers, OpenLoop
from benchmarks.picture import draw, first_answers
from benchmarks.report import RESULTS, Row, over
from benchmarks.servers import SERVICE_PORT, service, url
from benchmarks.wrk import load
from emaswap import Architecture, Publisher
from emaswap.priority import give_way

_RUNS = 5
_SECONDS = 20.0
_ALLOWANCE_S = 0.015
_PICTURE = RESULTS.parents[1] / "docs" / "swap.png"


def measure() -> list[Row]:
    """Four layers of 2,500 × 2,500, one row of JSON a request, from 32 connections, open loop."""
    request = {"inputs": [[round(value, 4) for value in torch.rand(2500).tolist()]]}
    runs = []
    with tempfile.TemporaryDirectory(prefix="emaswap-bench-") as folder:
        store = Path(folder) / "store"
        module = Wide()
        with (
            Publisher(
                store, name="wide", architecture=Architecture.of(Wide), probe=torch.rand(2, 2500), keep=2, grace_s=0
            ) as publisher,
        ):
            publisher.publish(module)
            publisher.flush()
            with service(store):
                per_s = load(url(SERVICE_PORT), request, connections=16, seconds=5).per_s / 2
                for _ in track(range(_RUNS), f"{per_s:.0f} requests a second, without swaps and with"):
                    without = OpenLoop(url(SERVICE_PORT), request, per_s=per_s, seconds=_SECONDS).answers()
                    with publishing(publisher, module) as published:
                        swapping = OpenLoop(url(SERVICE_PORT), request, per_s=per_s, seconds=_SECONDS).answers()
                    runs.append(_rows(without, swapping, len(published)))
                draw(without, swapping, _PICTURE)
    return over(runs)


@contextmanager
def publishing(publisher: Publisher, module: Wide) -> Iterator[list[float]]:
    """Publish new weights every second, on a thread that gives way, as a trainer elsewhere would take nothing from here."""
    stop = threading.Event()
    published: list[float] = []

    def publish() -> None:
        give_way()
        while not stop.wait(max(0.0, 1.0 - (time.monotonic() - published[-1])) if published else 0.0):
            published.append(time.monotonic())
            with torch.no_grad():
                torch._foreach_add_(list(module.parameters()), 1e-4)
            publisher.publish(module)
            publisher.flush()

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield published
    finally:
        stop.set()
        thread.join()


def _rows(without: Answers, swapping: Answers, published: int) -> list[Row]:
    failed = sum(status != 200 for answers in (without, swapping) for status in answers.status)
    seen = len(set(swapping.version))
    return [
        Row("p50 with a swap a second", swapping.percentile_s(50) * 1e3, "ms", without.percentile_s(50) * 1e3),
        Row("p99 with a swap a second", swapping.percentile_s(99) * 1e3, "ms", without.percentile_s(99) * 1e3, 1.1),
        Row(
            "p99.9 with a swap a second, against 15 ms more than without",
            swapping.percentile_s(99.9) * 1e3, "ms", (without.percentile_s(99.9) + _ALLOWANCE_S) * 1e3, 1.0,
        ),
        Row("versions that answered, of those published", seen, "versions", float(published)),
        Row("failed requests, of one", failed, "requests", 1.0, 0.0),
        Row("median time between two answers of different versions", _median_gap_s(swapping), "s"),
    ]  # fmt: skip


def _median_gap_s(answers: Answers) -> float:
    """Return the median time between the first answers of two versions in a row."""
    times = first_answers(answers)
    return median([later - earlier for earlier, later in pairwise(times)] or [0.0])
