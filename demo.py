"""The demonstration behind `make demo`: a trainer, a service, and clients that send requests all the while.

Takes about a minute, writes only to a temporary store, and exits with 1 if anything went wrong.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

STEPS, PUBLISH_EVERY = 1500, 50
CLIENTS = 2
MIN_VERSIONS, MIN_ACCURACY = 20, 0.97
TIMEOUT_S = 300.0

console = Console(highlight=False, soft_wrap=True)


@dataclass
class Tally:
    """What the clients saw, guarded by a lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    answers: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def main() -> int:
    """Run the demonstration and return the exit status."""
    with tempfile.TemporaryDirectory(prefix="emaswap-demo-") as folder:
        store = Path(folder) / "store"
        console.print(f"store: {store}")
        service = start("service", "--store", store, "--port", 0, "--threads", 1, "--log-format", "json")
        try:
            url = wait_for_url(service)
            console.print(f"service: {url} (pid {service.pid}), waiting for the first version")
            trainer = start(
                "trainer", "--store", store, "--task", "digits", "--steps", STEPS,
                "--publish-every", PUBLISH_EVERY, "--seed", 1, "--threads", 1,
            )  # fmt: skip
            try:
                console.print(
                    f"trainer: {STEPS} steps on real digits, a version every {PUBLISH_EVERY} (pid {trainer.pid})"
                )
                tally, lives = watch(url, trainer)
            finally:
                end(trainer)
            return summarise(tally, lives, trainer.returncode)
        finally:
            end(service)
            if service.returncode:
                console.print(f"the service exited with status {service.returncode}")


def start(module: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a process of this project. The caller must read its output."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def drain(lines: IO[str], kept: list[str]) -> None:
    """Read a process's output to its end, so that it never blocks on a full pipe; keep the last lines."""
    for line in lines:
        kept.append(line)
        del kept[:-50]


def wait_for_url(service: subprocess.Popen[str]) -> str:
    """Return the address that the service logs."""
    assert service.stdout is not None
    for line in service.stdout:
        event: dict[str, Any] = json.loads(line) if line.startswith("{") else {}
        if event.get("event") == "listening":
            threading.Thread(target=drain, args=(service.stdout, []), daemon=True).start()
            return f"http://{event['host']}:{event['port']}"
    raise SystemExit("the service did not start")


def watch(url: str, trainer: subprocess.Popen[str]) -> tuple[Tally, list[dict[str, Any]]]:
    """Run clients while the trainer runs, and print a line for each version that goes live."""
    output: list[str] = []
    reader = threading.Thread(target=drain, args=(trainer.stdout, output), daemon=True)
    reader.start()
    tally, stop = Tally(), threading.Event()
    lives: list[dict[str, Any]] = []
    deadline = time.monotonic() + TIMEOUT_S
    with httpx.Client(base_url=url, timeout=10) as client:
        while client.get("/readyz").status_code != httpx.codes.OK:
            if trainer.poll() or time.monotonic() > deadline:
                raise SystemExit("no version went live:\n" + "".join(output))
            time.sleep(0.05)
        clients = [threading.Thread(target=ask, args=(url, first, tally, stop)) for first in range(CLIENTS)]
        for thread in clients:
            thread.start()
        try:
            last = STEPS // PUBLISH_EVERY
            while time.monotonic() < deadline and (trainer.poll() is None or lives[-1]["version"] < last):
                live = client.get("/model/version").json()
                if not lives or live["version"] != lives[-1]["version"]:
                    lives.append(live)
                    console.print(line(live, tally))
                if trainer.poll():
                    raise SystemExit("the trainer failed:\n" + "".join(output))
                time.sleep(0.02)
        finally:
            stop.set()
            for thread in clients:
                thread.join()
    return tally, lives


def ask(url: str, first: int, tally: Tally, stop: threading.Event) -> None:
    """Be one client: send one image after another over one connection, and count which versions answer."""
    images = (load_digits().images / 16).reshape(-1, 1, 8, 8)
    with httpx.Client(base_url=url, timeout=10) as client:
        index = first
        while not stop.is_set():
            began = time.perf_counter()
            try:
                answer = client.post("/predict", json={"inputs": [images[index % len(images)].tolist()]})
                version = int(answer.json()["model"]["version"]) if answer.status_code == httpx.codes.OK else 0
                problem = "" if version else f"{answer.status_code} {answer.text}"
            except httpx.HTTPError as error:
                version, problem = 0, repr(error)
            with tally.lock:
                tally.seconds.append(time.perf_counter() - began)
                if problem:
                    tally.failures.append(problem)
                else:
                    tally.answers[version] += 1
            index += CLIENTS
            stop.wait(0.005)


def line(live: dict[str, Any], tally: Tally) -> str:
    """Return the line to print when a version goes live."""
    with tally.lock:
        answered, failed = tally.answers.total(), len(tally.failures)
    return (
        f"  live: version {live['version']:>2}  step {live['step']:>4}  "
        f"EMA accuracy {live['training']['metrics']['ema_accuracy']:.4f}  "
        f"served {live['publish_to_served_s'] * 1000:>4.0f} ms after publishing  "
        f"answers {answered:>5}, failures {failed}"
    )


def summarise(tally: Tally, lives: list[dict[str, Any]], trainer_status: int | None) -> int:
    """Print what happened, and return 0 if every promise was kept."""
    first, last = (live["training"]["metrics"]["ema_accuracy"] for live in (lives[0], lives[-1]))
    delays = [live["publish_to_served_s"] for live in lives]
    seconds = sorted(tally.seconds)
    table = Table("measure", "value", title="\nsummary", title_justify="left")
    table.add_row("versions served", f"{len(tally.answers)}")
    table.add_row("requests answered", f"{tally.answers.total()}")
    table.add_row("requests failed", f"{len(tally.failures)}")
    table.add_row("EMA accuracy, first version", f"{first:.4f} (version {lives[0]['version']})")
    table.add_row("EMA accuracy, last version", f"{last:.4f} (version {lives[-1]['version']})")
    table.add_row("publish to served, median and maximum", f"{statistics.median(delays):.3f} s, {max(delays):.3f} s")
    table.add_row(
        "latency, median and 99th percentile",
        f"{seconds[len(seconds) // 2] * 1000:.1f} ms, {seconds[len(seconds) * 99 // 100] * 1000:.1f} ms",
    )
    console.print(table)
    for problem in tally.failures[:5]:
        console.print(f"failed: {problem}")
    held = {
        f"at least {MIN_VERSIONS} versions were served": len(tally.answers) >= MIN_VERSIONS,
        "no request failed": not tally.failures,
        f"the last version's EMA accuracy is at least {MIN_ACCURACY}": last >= MIN_ACCURACY,
        "the trainer exited with status 0": trainer_status == 0,
    }
    for promise in [promise for promise, kept in held.items() if not kept]:
        console.print(f"BROKEN PROMISE: {promise}")
    console.print(
        "\nTo keep both running, start them in two terminals, in either order:\n"
        "  .venv/bin/python -m service --store store --port 8000\n"
        "  .venv/bin/python -m trainer --store store --task digits --steps 20000 --publish-every 200 --resume run"
    )
    return 0 if all(held.values()) else 1


def end(process: subprocess.Popen[str]) -> None:
    """Ask a process to end if it is still running, and wait for it."""
    if process.poll() is None:
        process.terminate()
    process.wait(60)


if __name__ == "__main__":
    sys.exit(main())
