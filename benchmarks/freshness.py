"""How long from `publish()` to the first answer by the new version, against moving the same bytes once."""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from statistics import median

import torch
from blake3 import blake3

from benchmarks.models import Heavy
from benchmarks.report import Row
from emaswap import Architecture, Publisher

_ROUNDS = 21
_ROWS = [[0.0, 1.0]]


def measure() -> list[Row]:
    """100 MB of weights through a directory on this machine's disk."""
    module = Heavy()
    with tempfile.TemporaryDirectory(prefix="emaswap-bench-") as folder:
        store = Path(folder) / "store"
        publisher = Publisher(
            store, name="heavy", architecture=Architecture.of(Heavy), probe=torch.tensor(_ROWS), keep=2, grace_s=0
        )
        publisher.publish(module)
        publisher.flush()
        service = subprocess.Popen(
            [sys.executable, "-m", "service", "--store", str(store), "--port", "8791", "--trust", "benchmarks.*"],
            stdout=subprocess.DEVNULL,
        )
        try:
            with closing(HTTPConnection("127.0.0.1", 8791, timeout=60)) as client:
                _wait_for(client, 1)
                floors, served = [], []
                memory = bytearray(sum(weight.nbytes for weight in module.parameters()))
                for version in range(2, 2 + _ROUNDS):
                    floors.append(_move(Path(folder), module, memory))
                    with torch.no_grad():
                        torch._foreach_add_(list(module.parameters()), 1.0)
                    began = time.perf_counter()
                    publisher.publish(module)
                    _wait_for(client, version)
                    served.append(time.perf_counter() - began)
            publisher.close()
        finally:
            service.terminate()
            service.wait(60)
    return [Row("publish → first answer, 100 MB", median(served) * 1000, "ms", median(floors) * 1000, 1.5)]


def _wait_for(client: HTTPConnection, version: int) -> None:
    """Ask until this version answers; by a client that takes next to nothing of the processors."""
    while True:
        try:
            client.request("POST", "/predict", json.dumps({"inputs": _ROWS}), {"Content-Type": "application/json"})
        except ConnectionError:
            client.close()
            time.sleep(0.05)
            continue
        answer = client.getresponse()
        body = answer.read()
        if answer.status == HTTPStatus.OK and json.loads(body)["model"]["version"] >= version:
            return
        time.sleep(0.005)


def _move(folder: Path, module: Heavy, memory: bytearray) -> float:
    """Write and fsync the bytes, read them into memory that is there, and digest them: what cannot be avoided."""
    parts = [weight.detach().numpy().data for weight in module.parameters()]
    path = folder / "moved"
    began = time.perf_counter()
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        os.fsync(file.fileno())
    with path.open("rb", buffering=0) as file:
        file.readinto(memory)
    blake3(memory).hexdigest()
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds
