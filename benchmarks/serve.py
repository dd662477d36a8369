"""How many requests a service answers, beside an empty ASGI application and the bare forward loop, by `wrk`.

With one worker and with two, which take turns on the same two processors.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import track

from benchmarks import models
from benchmarks.forward_loop import best_rows_per_s
from benchmarks.report import Row, over
from benchmarks.servers import CONSTANT_PORT, SERVICE_PORT, WORKERS_PORT, constant, service, url
from benchmarks.wrk import available, load
from emaswap import Architecture, Publisher

_RUNS = 5
_SECONDS = 3.0


def measure() -> list[Row]:
    """An MLP of 87 thousand parameters and a CNN of 1.3 million, one row of JSON a request."""
    if not available():
        raise SystemExit("the benchmark of serving needs wrk: apt-get install wrk")
    return [*_measure_mlp(), *_measure_cnn()]


def _measure_mlp() -> list[Row]:
    request = {"inputs": [[round(value, 6) for value in torch.rand(64).tolist()]]}
    runs = []
    with _serving("Mlp", 64), constant():
        for _ in track(range(_RUNS), "MLP beside an empty application"):
            run = []
            for connections, bar in ((64, 1.0), (16, 0.75), (1, None)):
                floor = load(url(CONSTANT_PORT), request, connections=connections, seconds=_SECONDS)
                ours = load(url(SERVICE_PORT), request, connections=connections, seconds=_SECONDS)
                if ours.errors:
                    raise RuntimeError(f"{ours.errors} requests were not answered right")
                name = f"MLP, {connections} connections"
                if bar is not None:
                    run.append(Row(name, ours.per_s, "answers/s", floor.per_s, bar, at_least=True))
                if connections == 64:
                    run.append(Row(f"{name}, p99 against p50", ours.p99_s * 1e6, "µs", ours.p50_s * 1e6, 2.0))
                if connections == 1:
                    run.append(Row(f"{name}, p50", ours.p50_s * 1e6, "µs", floor.p50_s * 1e6, 2.0))
                two = load(url(WORKERS_PORT), request, connections=connections, seconds=_SECONDS)
                if two.errors:
                    raise RuntimeError(f"{two.errors} requests were not answered right by two workers")
                row = Row(f"{name}, two workers", two.per_s, "answers/s", floor.per_s, at_least=True)
                run.append(replace(row, bar=1.3) if connections == 64 else row)
            runs.append(run)
    return over(runs)


def _measure_cnn() -> list[Row]:
    request = {"inputs": [[round(value, 6) for value in torch.rand(784).tolist()]]}
    runs = []
    with _serving("Cnn", 784):
        for _ in track(range(_RUNS), "CNN beside its forward loop"):
            floor, floor_of_two = (best_rows_per_s("Cnn", threads=threads) for threads in (1, 2))
            run = []
            for connections, bars in ((64, (0.75, 0.6, 1.7)), (16, (None,) * 3), (1, (None,) * 3)):
                name = f"CNN, {connections} connections"
                ours, two = (
                    load(url(port), request, connections=connections, seconds=_SECONDS).per_s
                    for port in (SERVICE_PORT, WORKERS_PORT)
                )
                run.append(Row(name, ours, "answers/s", floor, bars[0], at_least=True))
                run.append(Row(f"{name}, two workers", two, "answers/s", floor_of_two, bars[1], at_least=True))
                run.append(Row(f"{name}, two workers against one", two, "answers/s", ours, bars[2], at_least=True))
            runs.append(run)
    return over(runs)


@contextlib.contextmanager
def _serving(model: str, width: int) -> Iterator[None]:
    """Two services of a network, ready: of one worker, and of two."""
    make = getattr(models, model)
    with tempfile.TemporaryDirectory(prefix="emaswap-bench-") as folder:
        store = Path(folder) / "store"
        with Publisher(store, name=model, architecture=Architecture.of(make), probe=torch.rand(4, width)) as publisher:
            publisher.publish(make())
        with service(store), service(store, "--workers", "2", port=WORKERS_PORT):
            yield
