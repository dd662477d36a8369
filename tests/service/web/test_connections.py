"""Connections: how they are bounded, and how requests come on them that are not plain."""

import contextlib
import http.client
import json
import resource
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import httpx
import pytest

from emaswap import DirectoryStore
from tests.conftest import Publish
from tests.models import Linear
from tests.odd import connect
from tests.service.web.test_predict import ROWS, assert_healthy, assert_refused, head, put, receive, serving
from tests.serving import Served, ServiceProcess, wait_for

BODY = b'{"inputs": [[1, 2, 3]]}'
LENGTH = f"Content-Length: {len(BODY)}"
JSON = "Content-Type: application/json"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service with little patience."""
    store = DirectoryStore(tmp_path_factory.mktemp("connections"))
    put(store, Linear(), ROWS)
    with serving(
        store, head_timeout_s=0.3, idle_timeout_s=0.6, max_body_bytes=1 << 20, max_waiting_bytes=3 << 20
    ) as served:
        yield served


def closes(connection: socket.socket, within_s: float) -> bool:
    """Whether the other side closes a connection in time; what it sends before is dropped."""
    connection.settimeout(within_s)
    with contextlib.suppress(ConnectionError):
        try:
            while connection.recv(1 << 16):
                pass
        except TimeoutError:
            return False
    return True


# -- bounds -------------------------------------------------------------------------------------------------------------


def test_a_connection_that_says_nothing_is_closed(served: Served) -> None:
    """Silent connections do not stay for ever, neither new ones nor those that had an answer."""
    with connect(served) as silent, connect(served) as used:
        used.sendall(head(LENGTH, JSON) + BODY)
        assert receive(used)[0].status == 200
        assert closes(silent, 3)
        assert closes(used, 3)
    assert_healthy(served)


def test_a_head_that_drips_is_given_up(served: Served) -> None:
    """Sending a header now and then does not make the time longer."""
    with connect(served) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\n")
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() < began + 5:
                connection.sendall(b"X: y\r\n")
                time.sleep(0.05)
                connection.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    answer = connection.recv(1000)
                    break
                connection.setblocking(True)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"head_timeout" in answer
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "start", [b"POST /predict HTTP/1.1\r\n", b"GET /healthz HTTP/1.1\r\n", b""], ids=["hot", "cold", "none"]
)
@pytest.mark.parametrize("filler", [b"X: abcdefgh\r\n", b"a" * 13], ids=["many", "long"])
def test_headers_are_bounded(served: Served, start: bytes, filler: bytes) -> None:
    """Ten megabytes of headers are not kept: the client is told, and can read it."""
    with connect(served) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(start + (b"X: " if len(set(filler)) == 1 else b"") + filler * 800_000)
        answer = connection.recv(1000)
    assert answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    assert_healthy(served)


def test_trailers_are_not_kept(served: Served) -> None:
    """What comes as headers behind a body in chunks is dropped; the request is answered."""
    with connect(served) as connection:
        chunks = b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
        connection.sendall(head("Transfer-Encoding: chunked", JSON) + chunks + b"X: y\r\n" * 1000 + b"\r\n")
        assert receive(connection)[0].status == 200


def test_bodies_are_bounded_in_sum(served: Served) -> None:
    """When the bodies that are being sent take more than `--max-waiting-bytes`, the next ones are told to try again."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(served)) for _ in range(6)]
        refused: list[socket.socket] = []
        for connection in connections:
            connection.sendall(head(f"Content-Length: {1 << 20}", JSON) + b" " * ((1 << 20) - 1))
        deadline = time.monotonic() + 5
        while len(refused) < 3 and time.monotonic() < deadline:
            for connection in set(connections) - set(refused):
                connection.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    assert receive(connection)[1]["error"] == "queue_is_full"
                    refused.append(connection)
        assert len(refused) in (3, 4)
        assert_healthy(served)  # what comes in one piece has room
    wait_for(lambda: served.predict(" " * (1 << 19)).status_code == 422, what="room again")


def test_idle_connections_make_room(store: DirectoryStore, publish: Publish) -> None:
    """With few file handles, connections that do nothing are closed for those that ask."""
    publish()
    with ServiceProcess(store.root, "--max-connections", "20") as service, contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(connect(service))
        for _ in range(30):
            assert httpx.post(
                f"{service.url}/predict", content=BODY, headers={"Content-Type": "application/json"}
            ).is_success


def test_more_connections_than_there_is_room_for_are_told_so(store: DirectoryStore, publish: Publish) -> None:
    """Where all connections are busy, the next is refused in words."""
    publish()
    with ServiceProcess(store.root, "--max-connections", "5") as service, contextlib.ExitStack() as stack:
        time.sleep(0.05)  # the connection that asked whether it is ready is the one that has been idle for longest
        busy = [stack.enter_context(connect(service)) for _ in range(5)]
        for connection in busy:
            connection.sendall(head("Content-Length: 10", "Expect: 100-continue"))
            assert connection.recv(1000).startswith(b"HTTP/1.1 100")
        with connect(service) as another:
            assert receive(another)[1]["error"] == "queue_is_full"
        busy[0].close()
        wait_for(lambda: service.predict([[1, 2, 3]]).is_success, what="room again")


# -- requests that are not plain ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "offer",
    [
        ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"),
        ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA=="),
        ("Connection: upgrade", "Upgrade: TLS/1.0"),
    ],
    ids=["h2c", "websocket", "tls"],
)
def test_an_offer_to_upgrade_is_ignored(served: Served, offer: tuple[str, ...]) -> None:
    """The body is not lost, nor read as a second request, whole or in parts; the connection goes on."""
    inner = b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n"
    with connect(served) as connection:
        connection.sendall(head(LENGTH, JSON, *offer) + BODY)
        assert receive(connection)[0].status == 200
        connection.sendall(head(LENGTH, JSON, *offer) + BODY[:5])
        time.sleep(0.05)
        connection.sendall(BODY[5:])
        assert receive(connection)[0].status == 200
        connection.sendall(head(f"Content-Length: {len(inner)}", JSON, *offer) + inner)
        response, refusal = receive(connection)
        assert (response.status, refusal["error"]) == (400, "invalid_json")
        assert closes(connection, 3)


def test_requests_behind_one_another_are_answered_in_order(served: Served) -> None:
    """Pipelined requests, hot and cold ones, are each answered, in the order in which they came."""
    cold = b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n"
    hot = head(LENGTH, JSON) + BODY
    with connect(served) as connection:
        connection.sendall(hot + cold + hot + hot + cold + hot)
        got = b""
        while got.count(b"HTTP/1.1 200") < 6 or not got.endswith(b"}"):
            more = connection.recv(1 << 16)
            assert more, got
            got += more
    kinds = [b"outputs" in part for part in got.split(b"HTTP/1.1 ")[1:]]
    assert kinds == [True, False, True, True, False, True]


def test_a_length_of_many_digits_is_refused(served: Served) -> None:
    """A number that Python would not read is a 400 of ours, not a 500."""
    for length in ("0" * 5000, "9" * 30):
        with connect(served) as connection:
            connection.sendall(head(f"Content-Length: {length}", JSON))
            assert receive(connection)[0].status in (400, 413)
    assert_healthy(served)


def _by_http_client(url: str, body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request("POST", "/predict", body)
    answer = connection.getresponse()
    return answer.status, answer.read()


def _by_urllib(url: str, body: bytes) -> tuple[int, bytes]:
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{url}/predict", data=body, timeout=10)
    return error.value.code, error.value.read()


def _by_httpx(url: str, body: bytes) -> tuple[int, bytes]:
    answer = httpx.post(f"{url}/predict", content=body)
    return answer.status_code, answer.content


@pytest.mark.parametrize("client", [_by_http_client, _by_urllib, _by_httpx])
def test_clients_can_read_that_a_body_is_too_large(
    served: Served, client: Callable[[str, bytes], tuple[int, bytes]]
) -> None:
    """Clients that send everything before they read get the 413, not a reset connection."""
    for _ in range(5):
        status, body = client(served.url, b"[" + b"0," * (10 << 20) + b"0]")
        assert status == 413
        assert json.loads(body)["error"] == "body_too_large"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize(
    "flags", [["--http2"], ["--http1.0"], ["-H", "Expect: 100-continue"], ["-H", "Transfer-Encoding: chunked"]]
)
def test_curl_is_answered(served: Served, flags: list[str]) -> None:
    """Whatever curl offers, it gets its answer."""
    command = [
        "curl",
        "-sS",
        "--max-time",
        "10",
        "-H",
        JSON,
        "--data-binary",
        BODY.decode(),
        *flags,
        f"{served.url}/predict",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["model"]["version"] == 1


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/model/version", "/model/versions", "/docs"])
def test_head_is_answered_as_get(served: Served, path: str) -> None:
    """HEAD works where GET does, without a body."""
    answer = served.client.head(path)
    assert answer.status_code == 200
    assert not answer.content


def test_nobody_is_sent_elsewhere(served: Served) -> None:
    """A path with a slash too many is not found; a Host header never becomes a redirect."""
    answer = served.client.post("/predict/", json={"inputs": []}, headers={"Host": "evil.example"})
    assert_refused(answer, 404, "not_found")


# -- time ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("milliseconds", "status"), [("60000", 200), ("0", 504), ("-1", 400), ("1.5", 400), ("9" * 20, 400)]
)
def test_a_request_may_say_how_long_it_waits(served: Served, milliseconds: str, status: int) -> None:
    """`X-Request-Timeout-Ms` that has passed when the request's turn comes is a 504, and one that is no number a 400."""
    assert served.predict([[1, 2, 3]], **{"X-Request-Timeout-Ms": milliseconds}).status_code == status


def test_while_draining_connections_are_told_to_close(store: DirectoryStore, publish: Publish) -> None:
    """Answers of a service that drains say `Connection: close`, so that no client meets a reset."""
    publish()
    with ServiceProcess(store.root, "--drain-s", "1") as service:
        statuses: list[int] = []
        stop = threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=service.url) as client:
                while not stop.is_set():
                    statuses.append(client.post("/predict", json={"inputs": [[1, 2, 3]]}).status_code)

        asking = [threading.Thread(target=ask) for _ in range(8)]
        for thread in asking:
            thread.start()
        time.sleep(0.3)
        service.process.terminate()
        wait_for(lambda: service.events("draining"), what="draining")
        for path, answer in (
            ("/healthz", httpx.get(f"{service.url}/healthz")),
            ("/predict", httpx.post(f"{service.url}/predict", json={"inputs": [[1, 2, 3]]})),
        ):
            assert answer.headers["Connection"] == "close", path
        time.sleep(0.3)
        stop.set()
        for thread in asking:
            thread.join()
        assert service.process.wait(20) == 0
        assert set(statuses) == {200}


def test_few_file_handles_bound_the_connections(store: DirectoryStore, publish: Publish) -> None:
    """Where the process may have few files open, it has fewer connections, and goes on."""
    publish()
    with ServiceProcess(store.root) as service, contextlib.ExitStack() as stack:
        resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE, (64, 64))
        for _ in range(80):
            with contextlib.suppress(OSError):
                stack.enter_context(connect(service))
        wait_for(lambda: service.predict([[1, 2, 3]]).is_success, what="an answer")
