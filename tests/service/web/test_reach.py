"""Ways to reach a service: sockets, addresses, proxies, pages of other origins, and tokens."""

import socket
from pathlib import Path

import httpx
import pytest

from emaswap import DirectoryStore
from tests.models import Linear
from tests.odd import connect
from tests.service.web.test_predict import ROWS, assert_refused, head, put, receive, serving
from tests.serving import ServiceProcess, other_door, wait_for
from tests.test_health import health

ROW = {"inputs": [[1.0, 2.0, 3.0]]}
ORIGIN = "https://example.org"


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    """A store with a version in it."""
    store = DirectoryStore(tmp_path / "store")
    put(store, Linear(), ROWS)
    return store


@pytest.fixture
def socket_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path that is short enough for a Unix socket."""
    return tmp_path_factory.mktemp("s") / "s"


def test_a_unix_socket(store: DirectoryStore, socket_path: Path) -> None:
    """Requests and the health check come by a file; one that was left behind is no obstacle."""
    for _ in range(2):
        with ServiceProcess(store.root, "--uds", str(socket_path), wait=False) as service:
            transport = httpx.HTTPTransport(uds=str(socket_path))
            with httpx.Client(transport=transport, base_url="http://service") as client:
                wait_for(lambda: client.get("/readyz").status_code == 200)
                assert client.post("/predict", json=ROW).status_code == 200
            assert health("service", EMASWAP_UDS=str(socket_path))[0] == 0
            service.stop(9)
    assert health("service", EMASWAP_UDS=str(socket_path.with_name("none")))[0] == 1


def test_ipv6(store: DirectoryStore) -> None:
    """The service listens on an address of version 6, and its health check finds it there."""
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    with ServiceProcess(store.root, "--host", "::1", wait=False) as service:
        port = service.port
        wait_for(lambda: httpx.get(f"http://[::1]:{port}/readyz").status_code == 200)
        assert httpx.post(f"http://[::1]:{port}/predict", json=ROW).status_code == 200
        for host in ("::1", "::"):
            assert health("service", EMASWAP_HOST=host, EMASWAP_PORT=str(port))[0] == 0


def test_a_proxy_that_takes_off_a_path(store: DirectoryStore) -> None:
    """Behind --root-path the documentation finds its schema, and both doors answer."""
    with serving(store, root_path="/models/digits/") as served, other_door(served) as other:
        assert '"/models/digits/openapi.json"' in served.client.get("/docs").text.replace("'", '"')
        assert served.client.get("/openapi.json").json()["servers"] == [{"url": "/models/digits"}]
        for door in (served, other):
            assert door.client.post("/predict", json=ROW).status_code == 200


def test_pages_of_other_origins(store: DirectoryStore) -> None:
    """Browsers are told that those of --cors-origin may ask and read which version answered; others are not."""
    with serving(store, cors_origin=(ORIGIN,)) as served:
        asking = {
            "Origin": ORIGIN,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }
        allowed = served.client.options("/predict", headers=asking)
        assert allowed.status_code == 200
        assert allowed.headers["Access-Control-Allow-Origin"] == ORIGIN
        for _ in range(2):
            answer = served.client.post("/predict", json=ROW, headers={"Origin": ORIGIN})
            assert answer.status_code == 200
            assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
            assert "X-Model-Version" in answer.headers["Access-Control-Expose-Headers"]
        other = served.client.post("/predict", json=ROW, headers={"Origin": "https://evil.example"})
        assert "Access-Control-Allow-Origin" not in other.headers
    with serving(store) as served:
        answer = served.client.post("/predict", json=ROW, headers={"Origin": ORIGIN})
        assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("secret", [b"correct horse", "grüße aus dem süden".encode()], ids=["ASCII", "UTF-8"])
def test_a_token_for_predictions(store: DirectoryStore, tmp_path: Path, secret: bytes) -> None:
    """Where there is one, nobody without it is answered, by any route or door; the rest is open."""
    file = tmp_path / "token"
    file.write_bytes(secret + b"\n")
    with serving(store, predict_token_file=file) as served, other_door(served) as other:
        for door in (served, other):
            for wrong in ({}, {"Authorization": "Bearer wrong horse"}, {"Authorization": "correct horse"}):
                assert_refused(door.client.post("/predict", json=ROW, headers=wrong), 401, "unauthorized")
                assert door.client.post("/v2/models/test/infer", json={}, headers=wrong).status_code == 401
            assert door.client.get("/readyz").status_code == 200
            for _ in range(2):  # a head that is known, too
                answer = door.client.post("/predict", json=ROW, headers={b"Authorization": b"Bearer " + secret})
                assert answer.status_code == 200
        with connect(served) as connection:
            body = b'{"inputs": [[1, 2, 3]]}'
            connection.sendall(head(f"Content-Length: {len(body)}", "Authorization: Bearer \xff\xfe") + body)
            assert receive(connection)[0].status == 401


def test_proxies_are_believed_only_where_they_are_trusted(store: DirectoryStore) -> None:
    """A service starts with networks and addresses of proxies, and answers what they forward."""
    with serving(store, trusted_proxies=("127.0.0.1", "10.0.0.0/8")) as served:
        answer = served.client.post(
            "/predict", json=ROW, headers={"X-Forwarded-For": "1.2.3.4", "X-Forwarded-Proto": "https"}
        )
        assert answer.status_code == 200
