"""Real services for tests: in a thread of this process, or in a process of their own."""

import asyncio
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import uvicorn
from fastapi import FastAPI

from service.parts import Service
from service.settings import ServiceSettings
from service.web.app import create_app
from service.web.server import Server
from tests.programs import ROOT, Program, interpreter

__all__ = ["ADMIN", "ROOT", "TRUST", "Served", "ServiceProcess", "serve", "wait_for"]

TRUST = ("tests.models.*",)
ADMIN = {"Authorization": "Bearer correct horse"}

Result = TypeVar("Result")


def wait_for(condition: Callable[[], Result], *, timeout_s: float = 30.0, what: str = "") -> Result:
    """The condition's first true result. Fails when there is none in time."""
    end = time.monotonic() + timeout_s
    while True:
        if result := condition():
            return result
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout_s} s: {what or condition}")
        time.sleep(0.01)


class Served:
    """A running service as its clients see it."""

    def __init__(self, url: str, app: FastAPI | None = None, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.url = url
        self.loop = loop
        self.client = httpx.Client(base_url=url, timeout=30)
        self._app = app

    @property
    def app(self) -> FastAPI:
        """The application of a service that runs in this process."""
        assert self._app is not None
        return self._app

    @property
    def service(self) -> Service:
        """The parts of a service that runs in this process."""
        service: Service = self.app.state.service
        return service

    def predict(self, inputs: Any, **headers: str) -> httpx.Response:
        """POST /predict."""
        return self.client.post("/predict", json={"inputs": inputs}, headers=headers)

    def states(self) -> dict[int, dict[str, Any]]:
        """GET /model/versions by version."""
        return {entry["version"]: entry for entry in self.client.get("/model/versions").json()["versions"]}

    def metric(self, name: str) -> float:
        """One sample of /metrics by its full name, labels included."""
        for line in self.client.get("/metrics").text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample == name:
                return float(value)
        raise AssertionError(f"no metric {name}")

    def live(self) -> int | None:
        """The live version."""
        version: int | None = self.client.get("/model/versions").json()["live"]
        return version

    def wait_until_live(self, version: int, timeout_s: float = 30.0) -> None:
        """Return once this version is live."""
        wait_for(lambda: self.live() == version, timeout_s=timeout_s, what=f"version {version} live")

    def wait_until_rejected(self, version: int) -> dict[str, Any]:
        """Return the state of a version once it is rejected."""
        return wait_for(
            lambda: [s for v, s in self.states().items() if v == version and s["state"] == "rejected"],
            what=f"version {version} rejected",
        )[0]


@contextmanager
def serve(**settings: Any) -> Iterator[Served]:
    """A service in a thread of this process, on a free port."""
    settings = {"trust": TRUST, "drain_s": 0.0, "port": 0, "shutdown_s": 10, "guard_s": 0.0} | settings
    app = create_app(ServiceSettings.model_validate(settings))
    server = Server(app)
    thread = threading.Thread(target=server.run, name="service")
    thread.start()
    try:
        wait_for(lambda: server.started, what="the service's start")
        port = server.servers[0].sockets[0].getsockname()[1]
        served = Served(f"http://127.0.0.1:{port}", app, server.servers[0].get_loop())
        with served.client:
            yield served
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def other_door(served: Served) -> Iterator[Served]:
    """The same service behind uvicorn's own connections, as another ASGI server would have it."""
    config = uvicorn.Config(served.app, port=0, log_config=None, lifespan="off", server_header=False, http="httptools")
    server = uvicorn.Server(config)
    assert served.loop is not None
    running = asyncio.run_coroutine_threadsafe(server._serve(), served.loop)
    try:
        wait_for(lambda: server.started, what="the other door")
        port = server.servers[0].sockets[0].getsockname()[1]
        other = Served(f"http://127.0.0.1:{port}", served.app)
        with other.client:
            yield other
    finally:
        server.should_exit = True
        running.result(30)


class ServiceProcess(Served):
    """`python -m service` as a process of its own; its log lines are at hand.

    It is forked from the nursery, unless it is to be `fresh`: started as people start it.
    """

    def __init__(self, store: Path, *flags: str, port: int = 0, wait: bool = True, fresh: bool = False) -> None:
        command = ["-m", "service", "--store", str(store), "--port", str(port), "--log-format", "json"]
        trust = [flag for pattern in TRUST for flag in ("--trust", pattern)]
        start = interpreter if fresh else Program
        self.process = start(*command, *trust, *flags, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        listening = wait_for(lambda: self.events("listening"), timeout_s=60, what="listening")[0]
        self.port: int = listening.get("port", 0)
        super().__init__(f"http://127.0.0.1:{self.port}")
        if wait:
            wait_for(lambda: self.client.get("/readyz").status_code == 200, what="ready")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log's events of one name."""
        if self.process.poll() not in (None, 0, -signal.SIGKILL):
            raise AssertionError("the service has died:\n" + "\n".join(self.lines))
        parsed = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [event for event in parsed if event["event"] == name]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the process, if it has not ended, and return its exit status."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(60)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
