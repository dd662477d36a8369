"""The end of a service, as its signals bring it about: in time, whatever hangs."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from emaswap import DirectoryStore, Reason
from emaswap.store.line import Term
from tests import faulty_models, troubled_models
from tests.conftest import Publish
from tests.faulty_models import HANGS, Moody
from tests.forging import Forgery, commit
from tests.serving import ServiceProcess, wait_for

TRUST = [flag for pattern in (*faulty_models.TRUST, *troubled_models.TRUST) for flag in ("--trust", pattern)]


@contextmanager
def process(root: Path, *flags: str) -> Iterator[ServiceProcess]:
    """A service in a process of its own."""
    with ServiceProcess(root, *TRUST, *flags) as service:
        yield service


@contextmanager
def hanging_request(service: ServiceProcess) -> Iterator[None]:
    """A request whose forward pass hangs."""

    def ask() -> None:
        with contextlib.suppress(httpx.HTTPError):  # the service has ended
            httpx.post(f"{service.url}/predict", json={"inputs": [[float(HANGS), 0, 0]]}, timeout=60)

    asking = threading.Thread(target=ask)
    batches = service.metric("emaswap_batch_rows_count")
    asking.start()
    try:
        wait_for(lambda: service.metric("emaswap_batch_rows_count") > batches, what="a running batch")
        yield
    finally:
        service.stop(signal.SIGKILL)
        asking.join()


def stop(service: ServiceProcess, *, signals: int = 1, timeout_s: float) -> tuple[int, float]:
    """The exit status after so many SIGTERMs, and the seconds until the end."""
    began = time.monotonic()
    for _ in range(signals):
        service.process.send_signal(signal.SIGTERM)
        wait_for(lambda: service.events("draining"), what="draining")
    return service.process.wait(timeout_s), time.monotonic() - began


def test_a_load_that_hangs_does_not_hold_up_the_end(store: DirectoryStore) -> None:
    """With a load that would hang for minutes, one SIGTERM ends the service at once and with status 0."""
    term = Term(store, "test")
    commit(store, term)
    commit(store, term, Forgery(Reason.FACTORY_FAILED, factory="tests.troubled_models:endless"))
    with ServiceProcess(store.root, *TRUST, "--drain-s", "0.1", wait=False) as service:
        wait_for(lambda: service.states().get(2, {}).get("state") == "verifying", what="a load that hangs")
        status, seconds = stop(service, timeout_s=20)
        assert status == 0
        assert seconds < 10


def test_a_forward_pass_that_hangs_is_waited_for_only_so_long(store: DirectoryStore, publish: Publish) -> None:
    """After the first SIGTERM, a request that hangs has `--shutdown-s` seconds, and then the service ends with 0."""
    publish(Moody())
    with process(store.root, "--drain-s", "0.1", "--shutdown-s", "1") as service, hanging_request(service):
        status, seconds = stop(service, timeout_s=20)
        assert status == 0
        assert seconds < 10


def test_a_second_signal_ends_it_at_once(store: DirectoryStore, publish: Publish) -> None:
    """Whoever does not want to wait for requests in flight sends SIGTERM again."""
    publish(Moody())
    with process(store.root, "--shutdown-s", "60") as service, hanging_request(service):
        status, seconds = stop(service, signals=2, timeout_s=20)
        assert status == 128 + signal.SIGTERM
        assert seconds < 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_without_anything_that_hangs_it_ends_with_0(store: DirectoryStore, publish: Publish, number: int) -> None:
    """Either signal ends an idle service in about the time that it drains."""
    publish()
    with process(store.root, "--drain-s", "0.1") as service:
        began = time.monotonic()
        assert service.stop(number) == 0
        assert time.monotonic() - began < 10
