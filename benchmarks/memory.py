"""How much memory workers take together, and how long they take to start."""

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from statistics import median

import torch
from rich.progress import track

from benchmarks.models import Heavy
from benchmarks.report import Row
from benchmarks.servers import SERVICE_PORT, service
from emaswap import Architecture, Publisher

_NUMBERS = 100_000_000
_WORKERS = 4
_RUNS = 3
_INTERPRETER = "import torch, time; torch.ones(8) + 1; print(flush=True); time.sleep(600)"
_IMPORTS = "import torch, fastapi"
_MEBI = 1 << 20


def measure() -> list[Row]:
    """A model of 400 MB behind one worker and behind four; PSS, which counts shared pages once."""
    module = Heavy(_NUMBERS)
    size = sum(weight.nbytes for weight in module.parameters())
    with tempfile.TemporaryDirectory(prefix="emaswap-bench-") as folder:
        store = Path(folder) / "store"
        publisher = Publisher(
            store, name="heavy", architecture=Architecture.of(Heavy, numbers=_NUMBERS), probe=torch.rand(2, 2), keep=2,
            grace_s=0,
        )  # fmt: skip
        with publisher:
            publisher.publish(module)
            publisher.flush()
            interpreter = _interpreter()
            one = _steady(store, 1)
            four = _steady(store, _WORKERS)
            peaks = [_peak(store, publisher, module, workers) for workers in (1, _WORKERS)]
        starts = [_start(store) for _ in track(range(_RUNS), "starting four workers beside bare imports")]
    floor = one + 3 * interpreter
    rows = [
        Row("an interpreter with torch", interpreter / _MEBI, "MiB"),
        Row("400 MB, one worker", one / _MEBI, "MiB"),
        Row("400 MB, four workers (floor: one, and three interpreters)", four / _MEBI, "MiB", floor / _MEBI, 1.05),
    ]
    for workers, (steady, peak) in zip((1, _WORKERS), peaks, strict=True):
        name = f"copies of the weights, {workers} worker{'s' if workers > 1 else ''}"
        rest = one - size if workers == 1 else four - size
        rows.append(Row(f"{name}, after swaps", (steady - rest) / size, "copies", 1.0, 2.0))
        rows.append(Row(f"{name}, at the peak of a swap", (peak - rest) / size, "copies", 1.0, 3.0))
    took, floors = zip(*starts, strict=True)
    rows.append(Row("start of four workers (floor: as many bare imports)", median(took), "s", median(floors), 1.5))
    return rows


def _interpreter() -> int:
    with subprocess.Popen([sys.executable, "-c", _INTERPRETER], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = _pss(process.pid)
        process.kill()
    return found


def _steady(store: Path, workers: int) -> int:
    with service(store, "--workers", str(workers)) as process:
        _ask(200)
        return sum(map(_pss, _tree(process.pid)))


def _peak(store: Path, publisher: Publisher, module: Heavy, workers: int) -> tuple[int, int]:
    """Return the bytes after ten swaps, and the most that were seen while they happened."""
    with service(store, "--workers", str(workers), "--guard-s", "0") as process, _watched(process.pid) as seen:
        for _ in track(range(10), f"swaps with {workers} workers"):
            with torch.no_grad():
                torch._foreach_add_(list(module.parameters()), 1.0)
            publisher.publish(module)
            publisher.flush()
            _wait_for(publisher.latest.version if publisher.latest else 0)
            _ask(20)
        peak = max(seen)
        time.sleep(1)
        return sum(map(_pss, _tree(process.pid))), peak


@contextlib.contextmanager
def _watched(pid: int) -> Iterator[list[int]]:
    seen = [0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            with contextlib.suppress(OSError):
                seen.append(sum(map(_pss, _tree(pid))))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield seen
    finally:
        over.set()
        watching.join()


def _start(store: Path) -> tuple[float, float]:
    """Return how long four workers took until they answered, and as many interpreters for their imports."""
    began = time.perf_counter()
    with service(store, "--workers", str(_WORKERS)):
        _ask(1)
        took = time.perf_counter() - began
    began = time.perf_counter()
    bare = [subprocess.Popen([sys.executable, "-c", _IMPORTS]) for _ in range(_WORKERS)]
    for process in bare:
        process.wait()
    return took, time.perf_counter() - began


def _ask(times: int) -> None:
    for _ in range(times):
        _predict()


def _wait_for(version: int) -> None:
    while _predict() < version:
        time.sleep(0.01)


def _predict() -> int:
    with contextlib.closing(HTTPConnection("127.0.0.1", SERVICE_PORT, timeout=60)) as client:
        client.request("POST", "/predict", '{"inputs": [[0.0, 1.0]]}', {"Content-Type": "application/json"})
        return int(client.getresponse().headers["X-Model-Version"])


def _tree(pid: int) -> list[int]:
    """Return a process and all below it."""
    children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _words(task / "children")]
    return [pid, *(below for child in children for below in _tree(child))]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
