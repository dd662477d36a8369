"""The containers' health checks as processes: what they say, and the status that they end with."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Publish
from tests.serving import ROOT, Served


def health(application: str, **variables: str) -> tuple[int, str]:
    """The status of `python -m APPLICATION.health` with these variables alone, and what it says."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("EMASWAP_")}
    done = subprocess.run(
        [sys.executable, "-m", f"{application}.health"],
        cwd=ROOT,
        env=others | variables,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout.strip()


# -- the service -----------------------------------------------------------------------------------------------------


@contextmanager
def asked() -> Iterator[tuple[socket.socket, Future[tuple[int, str]]]]:
    """The connection over which a health check has asked a listener that is no service, and what the check ends with."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(30)
        check = pool.submit(health, "service", EMASWAP_PORT=str(listener.getsockname()[1]))
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(4096).startswith(b"GET /readyz ")
            yield connection, check


def port_of(served: Served) -> str:
    """The port that a service listens on."""
    return str(served.client.base_url.port)


def test_a_service_that_is_ready_is_healthy(served: Served, publish: Publish) -> None:
    """With a live version it is 0, with what /readyz says."""
    served.wait_until_live(publish().version)
    assert health("service", EMASWAP_PORT=port_of(served)) == (0, '{"ready":true,"version":1,"reason":null}')


def test_a_service_without_a_live_version_is_not_healthy(served: Served) -> None:
    """Over an empty store it is 1, with the reason that /readyz gives."""
    status, line = health("service", EMASWAP_PORT=port_of(served))
    assert status == 1
    assert '"reason":"there is no version in the store yet"' in line


def test_a_service_that_is_not_there_is_not_healthy() -> None:
    """Where nothing listens, that is what it says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, so that nobody else gets it, but not listening
        status, line = health("service", EMASWAP_PORT=str(free.getsockname()[1]))
    assert status == 1
    assert line.startswith("the service does not answer: ")
    assert "Connection refused" in line


def test_a_service_that_hangs_is_not_healthy() -> None:
    """One that takes the request and never answers is given up before the five seconds of the Dockerfile are over."""
    with asked() as (connection, check):
        began = time.monotonic()
        assert connection.recv(4096) == b""  # it hangs up
        assert time.monotonic() - began < 5
        assert check.result() == (1, "the service does not answer: timed out")


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (b"", "Remote end closed connection without response"),
        (b"220 ready for mail\r\n", "220 ready for mail"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n{", "IncompleteRead(1 bytes read, 39 more expected)"),
    ],
)
def test_half_an_answer_is_none(answer: bytes, what: str) -> None:
    """Whatever hangs up in the middle, or speaks another protocol, is not a service that is ready."""
    with asked() as (connection, check):
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        assert check.result() == (1, f"the service does not answer: {what}")


def test_what_another_server_answers_is_shown() -> None:
    """An answer that is not of a service is 1, and is there to be read even if it is not UTF-8."""
    with asked() as (connection, check):
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nrat\xe9")
        assert check.result() == (1, "rat\\xe9")


def test_a_port_that_is_no_number_is_named() -> None:
    """The line says which variable it is, and what it has."""
    assert health("service", EMASWAP_PORT="http") == (1, "EMASWAP_PORT: expected the number of a port, got 'http'")


# -- the trainer -----------------------------------------------------------------------------------------------------


@pytest.fixture
def heartbeat(tmp_path: Path) -> Path:
    """The file of a trainer that has just made a step."""
    path = tmp_path / "heartbeat"
    path.touch()
    return path


def touch(path: Path, ago_s: float) -> None:
    """Have the last step been so long ago."""
    then = time.time() - ago_s
    os.utime(path, (then, then))


def test_a_trainer_whose_heartbeat_has_no_name_is_not_healthy() -> None:
    """Without EMASWAP_HEARTBEAT there is nothing to look at, and that is what it says."""
    expected = (1, "EMASWAP_HEARTBEAT is not set: expected the file that the trainer touches at each step")
    assert health("trainer") == health("trainer", EMASWAP_HEARTBEAT="") == expected


def test_a_trainer_before_its_first_step_is_not_healthy(tmp_path: Path) -> None:
    """As long as the file is missing, no step has been made."""
    assert health("trainer", EMASWAP_HEARTBEAT=str(tmp_path / "none")) == (1, "the trainer has not made a step yet")


def test_a_trainer_that_makes_steps_is_healthy(heartbeat: Path) -> None:
    """A file that was touched half a minute ago is 0, with its age."""
    touch(heartbeat, 30)
    status, line = health("trainer", EMASWAP_HEARTBEAT=str(heartbeat))
    assert status == 0
    assert line.startswith("the last step was 3")


def test_a_trainer_that_hangs_is_not_healthy(heartbeat: Path) -> None:
    """After more than a minute without a step it is 1, with the age."""
    touch(heartbeat, 3700)
    status, line = health("trainer", EMASWAP_HEARTBEAT=str(heartbeat))
    assert status == 1
    assert line.startswith("the last step was 37")


@pytest.mark.parametrize(("age_s", "max_age_s", "expected"), [(30, "20", 1), (3700, "4000.5", 0)])
def test_how_old_the_last_step_may_be_is_a_setting(
    heartbeat: Path, age_s: float, max_age_s: str, expected: int
) -> None:
    """EMASWAP_HEARTBEAT_MAX_AGE_S allows less than a minute, or more."""
    touch(heartbeat, age_s)
    status, _ = health("trainer", EMASWAP_HEARTBEAT=str(heartbeat), EMASWAP_HEARTBEAT_MAX_AGE_S=max_age_s)
    assert status == expected


def test_an_age_that_is_no_number_is_named(heartbeat: Path) -> None:
    """The line says which variable it is, and what it has."""
    assert health("trainer", EMASWAP_HEARTBEAT=str(heartbeat), EMASWAP_HEARTBEAT_MAX_AGE_S="1min") == (
        1,
        "EMASWAP_HEARTBEAT_MAX_AGE_S: expected a number of seconds, got '1min'",
    )


def test_a_heartbeat_that_cannot_be_looked_at_is_named(heartbeat: Path) -> None:
    """A path through what is no folder is 1, and not taken for a trainer before its first step."""
    path = heartbeat / "heartbeat"
    assert health("trainer", EMASWAP_HEARTBEAT=str(path)) == (1, f"cannot read the age of {path}: Not a directory")
