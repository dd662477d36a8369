"""Open-loop load: requests leave at fixed times, whether or not earlier ones were answered.

Latency counts from when a request was due, so a server that stands still for a while cannot hide how many it kept
waiting (coordinated omission).
"""

import asyncio
import json
import sys
import time
from collections import deque
from dataclasses import dataclass
from subprocess import PIPE, Popen
from urllib.parse import urlsplit

import uvloop

_END_OF_HEAD = b"\r\n\r\n"


@dataclass(frozen=True)
class Answers:
    """What came back: when each request was due, in seconds from the start; its latency; its status; its version."""

    due_s: list[float]
    latency_s: list[float]
    status: list[int]
    version: list[int]

    def percentile_s(self, percent: float) -> float:
        """Return the latency that so many percent of the requests did not exceed."""
        ranked = sorted(self.latency_s)
        return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))]


class OpenLoop:
    """A client in a process of its own."""

    def __init__(self, url: str, request: object, *, per_s: float, seconds: float, connections: int = 32) -> None:
        """Begin to send one JSON request again and again."""
        command = [sys.executable, "-m", "benchmarks.open_loop", url, str(per_s), str(seconds), str(connections)]
        self._process = Popen(command, stdin=PIPE, stdout=PIPE, text=True)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request))
        self._process.stdin.close()

    def answers(self) -> Answers:
        """Return what came back, once all requests were sent and answered."""
        assert self._process.stdout is not None
        told = self._process.stdout.read()
        if self._process.wait():
            raise RuntimeError("the client failed")
        return Answers(**json.loads(told))


class _Connection(asyncio.Protocol):
    """One connection; it sends a request when it is told to, and tells when it has the answer."""

    def __init__(self, client: "_Client") -> None:
        self._client = client
        self._data = b""
        self.due = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._client.free.append(self)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, body = self._data.partition(_END_OF_HEAD)
        if not end:
            return
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
        if len(body) >= int(fields[b"content-length"]):
            self._data = b""
            self._client.answered(self, int(head.split()[1]), int(fields.get(b"x-model-version", b"0")))

    def connection_lost(self, _: Exception | None) -> None:
        if not self._client.done.is_set():
            self._client.answered(self, 0, 0)


class _Client:
    def __init__(self, message: bytes, times: list[float]) -> None:
        self._message = message
        self._times = deque(times)
        self._late: deque[float] = deque()
        self._expected = len(times)
        self.free: list[_Connection] = []
        self.done = asyncio.Event()
        self.told = Answers([], [], [], [])

    async def run(self, host: str, port: int, connections: int) -> Answers:
        loop = asyncio.get_running_loop()
        for _ in range(connections):
            await loop.create_connection(lambda: _Connection(self), host, port)
        self._began = time.perf_counter()
        while self._times:
            now = time.perf_counter() - self._began
            while self._times and self._times[0] <= now:
                self._send(self._times.popleft())
            if self._times:
                await asyncio.sleep(max(0.0, self._times[0] - (time.perf_counter() - self._began)))
        await asyncio.wait_for(self.done.wait(), 60)
        return self.told

    def _send(self, due: float) -> None:
        if not self.free:
            self._late.append(due)
            return
        connection = self.free.pop()
        connection.due = due
        connection.transport.write(self._message)  # type: ignore[attr-defined]

    def answered(self, connection: _Connection, status: int, version: int) -> None:
        self.told.due_s.append(connection.due)
        self.told.latency_s.append(time.perf_counter() - self._began - connection.due)
        self.told.status.append(status)
        self.told.version.append(version)
        self.free.append(connection)
        if self._late:
            self._send(self._late.popleft())
        if len(self.told.due_s) == self._expected:
            self.done.set()


def _main(url: str, per_s: float, seconds: float, connections: int) -> None:
    where = urlsplit(url)
    body = sys.stdin.read().encode()
    message = (
        f"POST {where.path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    times = [index / per_s for index in range(int(per_s * seconds))]

    async def run() -> Answers:
        return await _Client(message, times).run(where.hostname or "", where.port or 80, connections)

    print(json.dumps(uvloop.run(run()).__dict__))


if __name__ == "__main__":
    _main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
