"""A model that is quick, so that it runs on the event loop, and then hangs there."""

import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from emaswap import DirectoryStore
from tests import faulty_models
from tests.conftest import Publish
from tests.faulty_models import HANGS, Moody
from tests.models import Linear
from tests.serving import ServiceProcess, wait_for

GOOD = [[0.0, 0.5, 1.0]]
TRUST = [flag for pattern in faulty_models.TRUST for flag in ("--trust", pattern)]


@contextmanager
def quick_service(root: Path, *flags: str) -> Iterator[ServiceProcess]:
    """A service that has answered a thousand requests, each in less than a millisecond."""
    with ServiceProcess(root, *TRUST, *flags) as service:
        for _ in range(1000):
            assert service.predict(GOOD).status_code == 200
        yield service


def test_a_quick_model_that_hangs_is_given_up(store: DirectoryStore, publish: Publish) -> None:
    """The request is refused after `--forward-timeout-s`, the version is given up, and the next one is served."""
    publish(Linear())
    publish(Moody())
    with quick_service(store.root, "--forward-timeout-s", "1") as service:
        began = time.monotonic()
        answer = service.predict([[float(HANGS), 0.5, 1.0]])
        assert answer.status_code == 503
        assert answer.json()["error"] == "forward_timeout"
        assert time.monotonic() - began < 5
        wait_for(lambda: service.states()[2]["state"] == "rejected", what="the version given up")
        service.wait_until_live(1)
        assert service.predict(GOOD).headers["X-Model-Version"] == "1"
        assert service.stop() == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_a_hang_on_the_event_loop_does_not_hold_up_the_end(
    store: DirectoryStore, publish: Publish, signals: int
) -> None:
    """The first SIGTERM ends the service in its time, the second at once."""
    publish(Moody())
    with quick_service(store.root, "--forward-timeout-s", "60", "--shutdown-s", "1", "--drain-s", "0.1") as service:

        def ask() -> None:
            with pytest.raises(httpx.HTTPError):
                httpx.post(f"{service.url}/predict", json={"inputs": [[float(HANGS), 0.5, 1.0]]}, timeout=30)

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.3)
        with pytest.raises(httpx.ReadTimeout):  # it does hang on the event loop
            httpx.get(f"{service.url}/healthz", timeout=0.3)
        began = time.monotonic()
        for _ in range(signals):
            service.process.send_signal(signal.SIGTERM)
            wait_for(lambda: service.events("draining"), what="draining")
        status = service.process.wait(20)
        asking.join()
        assert status == (0 if signals == 1 else 128 + signal.SIGTERM)
        assert time.monotonic() - began < (5 if signals == 1 else 1)


def test_what_cannot_be_interrupted_ends_the_process() -> None:
    """Native code that never comes back leaves only the end, so that a supervisor can start anew."""
    program = textwrap.dedent("""
        import signal
        from service.serving import watchdog
        watchdog._LAST_S = 0.5
        guard = watchdog.Watchdog(0.3)
        print(guard.guard(lambda: "in time"), flush=True)
        try:
            guard.guard(lambda: [None for _ in iter(int, 1)])
        except watchdog.Interrupted:
            print("interrupted", flush=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGURG})  # as native code that does not return would
        guard.guard(lambda: [None for _ in iter(int, 1)])
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[:2] == ["in time", "interrupted"]
    assert done.returncode == 70
