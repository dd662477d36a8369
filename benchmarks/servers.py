"""Servers as processes of their own, for as long as a benchmark needs them."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

SERVICE_PORT, CONSTANT_PORT, WORKERS_PORT = 8791, 8792, 8793


@contextlib.contextmanager
def service(store: Path, *flags: str, port: int = SERVICE_PORT) -> Iterator["subprocess.Popen[bytes]"]:
    """A service over a store, ready."""
    command = ["-m", "service", "--store", str(store), "--port", str(port), "--trust", "benchmarks.*", *flags]
    with _process(port, *command) as process:
        yield process


def constant() -> "contextlib.AbstractContextManager[subprocess.Popen[bytes]]":
    """An empty ASGI application, ready."""
    return _process(CONSTANT_PORT, "-m", "benchmarks.constant", str(CONSTANT_PORT))


def url(port: int) -> str:
    """Where predictions are asked for."""
    return f"http://127.0.0.1:{port}/predict"


@contextlib.contextmanager
def _process(port: int, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    try:
        _wait_until_ready(port)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_ready(port: int, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with contextlib.suppress(OSError), contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=5)) as client:
            client.request("GET", "/readyz")
            if client.getresponse().status == 200:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nothing was ready on port {port} within {timeout_s:g} s")
