"""A crew of workers, and clients that ask it all the time and keep what they were told."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.faulty_models import TRUST
from tests.serving import ServiceProcess, wait_for

ROW = [[1.0, 2.0, 3.0]]
FLAGS = ["--poll-s", "0.05", "--drain-s", "0", *(flag for pattern in TRUST for flag in ("--trust", pattern))]


class Crew(ServiceProcess):
    """A service of several workers."""

    def __init__(self, store: Path, *flags: str, workers: int = 2, **options: Any) -> None:
        super().__init__(store, "--workers", str(workers), *FLAGS, *flags, **options)
        self.client.close()
        self.client = _Patient(base_url=self.url, timeout=30)
        wait_for(lambda: self.metric("emaswap_workers") == workers, what="all workers")

    def pids(self) -> dict[int, int]:
        """The pid of each worker that has been started last under its number."""
        return {event["worker"]: event["pid"] for event in self.events("worker started")}


class _Patient(httpx.Client):
    """Asks again for what may be asked again when the worker behind its connection has ended."""

    def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Send a request."""
        for _ in range(3):
            try:
                return super().send(request, **options)
            except httpx.TransportError:
                if request.method != "GET":
                    raise
        return super().send(request, **options)


class Client(threading.Thread):
    """Asks again and again, over a connection of its own, and keeps what it was told."""

    def __init__(self, crew: Crew, watch: "Watch") -> None:
        super().__init__(name="client")
        self.url = crew.url
        self.watch = watch
        self.answers: list[int] = []
        self.failures: list[str] = []

    def run(self) -> None:
        client = httpx.Client(base_url=self.url, timeout=20)
        while not self.watch.over.is_set():
            before = self.watch.newest
            try:
                answer = client.post("/predict", json={"inputs": ROW})
            except httpx.HTTPError as error:
                self.failures.append(repr(error))
                client.close()
                client = httpx.Client(base_url=self.url, timeout=20)
                continue
            if answer.status_code != 200:
                self.failures.append(answer.text)
                continue
            version = int(answer.headers["X-Model-Version"])
            self.answers.append(version)
            self.watch.note(before, version)
        client.close()


class Watch:
    """What all clients together were answered by: a request that is sent after an answer is not answered by less."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.newest = 0
        self.back: list[tuple[int, int]] = []
        self._turn = threading.Lock()

    def note(self, before: int, version: int) -> None:
        """Note an answer, and what the newest one was when its request was sent."""
        with self._turn:
            if version < before:
                self.back.append((before, version))
            self.newest = max(self.newest, version)


@contextmanager
def asked(crew: Crew, clients: int = 8) -> Iterator[tuple[Watch, list[Client]]]:
    """A crew under load."""
    watch = Watch()
    asking = [Client(crew, watch) for _ in range(clients)]
    for client in asking:
        client.start()
    try:
        yield watch, asking
    finally:
        watch.over.set()
        for client in asking:
            client.join()


def memory(crew: Crew) -> int:
    """The bytes that all processes of a crew hold together, besides files; what they share counts once.

    Start it `fresh`: what is forked from the tests' own processes shares memory with those, and its part grows when they end.
    """
    return sum(_held(pid, "Pss_Anon:", "Pss_Shmem:") for pid in _tree(crew.process.pid))


def shared_memory(crew: Crew) -> int:
    """The bytes of shared memory that the processes of a crew map."""
    return sum(_held(pid, "Pss_Shmem:") for pid in _tree(crew.process.pid))


def _tree(pid: int) -> list[int]:
    below = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [pid, *(each for child in below for each in _tree(child))]


def _held(pid: int, *kinds: str) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    lines = (line.split() for line in rollup.splitlines() if line.startswith(kinds))
    return sum(int(count) * 1024 for _, count, _ in lines)
