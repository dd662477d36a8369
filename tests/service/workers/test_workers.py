"""Several workers behind one socket: what clients see of swaps, of workers that end or hang, and of the end of all."""

import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch

from emaswap import DirectoryStore
from tests.conftest import Publish
from tests.crew import FLAGS, ROW, Crew, asked, memory, shared_memory
from tests.faulty_models import BREAKS, Deadly, Fragile, Moody
from tests.models import Large, Linear
from tests.service.web.test_predict import ROWS, put
from tests.serving import ADMIN, ServiceProcess, wait_for


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.long)])
def test_all_workers_change_version_together(store: DirectoryStore, publish: Publish, workers: int) -> None:
    """Whichever connections a client uses, versions never go back; every answer is the version's own; nothing fails."""
    publish()
    with Crew(store.root, workers=workers) as crew, asked(crew) as (watch, clients):
        for version in range(2, 22):
            publish()
            wait_for(lambda version=version: watch.newest >= version, what=f"version {version}")  # type: ignore[misc]
        watch.over.set()
        for client in clients:
            client.join()
        assert not watch.back
        assert not [failure for client in clients for failure in client.failures]
        answers = sum(len(client.answers) for client in clients)
        assert crew.metric('emaswap_requests_total{status="200"}') == answers
        assert crew.metric("emaswap_live_version") == 21


def test_answers_are_those_of_the_version_they_name(store: DirectoryStore, publish: Publish) -> None:
    """Outputs belong to the weights of the version in the same answer, whichever worker gave it."""
    modules = {publish(module).version: module for module in (Linear(), Linear())}
    with Crew(store.root) as crew:
        for version in (2, 3):
            if version not in modules:
                module = Linear()
                modules[publish(module).version] = module
            wait_for(lambda version=version: crew.live() == version)  # type: ignore[misc]
            for _ in range(8):
                answer = httpx.post(f"{crew.url}/predict", json={"inputs": ROW}, timeout=20)
                assert answer.headers["X-Model-Version"] == str(version)
                expected = modules[version].eval()(torch.tensor(ROW)).tolist()
                assert answer.json()["outputs"] == [pytest.approx(row) for row in expected]


def test_nans_are_taken_back_by_all(store: DirectoryStore) -> None:
    """The request is answered by the version before, and no worker goes on with the new one."""
    put(store, Fragile(1e9), torch.rand(4, 3))
    with Crew(store.root) as crew:
        put(store, Fragile(5), torch.rand(4, 3))
        crew.wait_until_live(2)
        answer = crew.predict([[1, 0, 0], [7, 0, 0]])
        assert answer.json()["outputs"] == [[1], [7]]
        assert answer.headers["X-Model-Version"] == "1"
        assert crew.wait_until_rejected(2)["reason"] == "answers_not_finite"
        for _ in range(8):
            other = httpx.post(f"{crew.url}/predict", json={"inputs": [[7, 0, 0]]}, timeout=20)
            assert other.headers["X-Model-Version"] == "1"
            assert other.json()["outputs"] == [[7]]
        assert crew.metric("emaswap_rollbacks_total") == 1


def test_a_version_that_breaks_is_withdrawn_everywhere(store: DirectoryStore) -> None:
    """What one worker finds broken, none answers with."""
    put(store, Moody(), ROWS)
    with Crew(store.root, "--guard-s", "60") as crew:
        put(store, Moody(), ROWS)
        crew.wait_until_live(2)
        assert crew.predict([[float(BREAKS), 0.5, 1]]).json()["error"] == "version_changed"
        wait_for(lambda: crew.live() == 1, what="version 1 live again")
        for _ in range(8):
            answer = httpx.post(f"{crew.url}/predict", json={"inputs": [[0, 0.5, 1]]}, timeout=20)
            assert (answer.status_code, answer.headers["X-Model-Version"]) == (200, "1")


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)])
def test_a_worker_that_ends_or_hangs_is_replaced(
    store: DirectoryStore, publish: Publish, number: signal.Signals
) -> None:
    """Connections to the other one are unaffected; within 5 s there is a new worker, at the right version."""
    publish()
    with Crew(store.root) as crew:
        publish()
        crew.wait_until_live(2)
        with asked(crew) as (watch, clients):
            wait_for(lambda: all(client.answers for client in clients), what="answers")
            gone = crew.pids()[0]
            before = {client: len(client.answers) for client in clients}
            os.kill(gone, number)
            began = time.monotonic()
            wait_for(lambda: crew.pids()[0] != gone, timeout_s=5, what="a new worker")
            wait_for(
                lambda: httpx.get(f"{crew.url}/metrics", timeout=5).text.count("emaswap_workers 2.0"),
                timeout_s=5,
                what="two workers",
            )
            assert time.monotonic() - began < 5
            publish()
            wait_for(lambda: watch.newest == 3, what="version 3")
        assert not watch.back
        hit = [client for client in clients if client.failures]
        assert len(hit) < len(clients)
        assert all(len(client.answers) > before[client] for client in clients)
        assert all(len(client.failures) == 1 for client in hit), [client.failures for client in hit]
        assert not Path(f"/proc/{gone}").exists()


@pytest.mark.long
def test_a_version_that_ends_processes_ends_one_at_a_time(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker builds it first, and dies; the others answer all the while, and the next good version goes live."""
    put(store, Deadly(), ROWS)
    monkeypatch.setenv("DEADLY", "exit")
    crew = Crew(store.root, workers=3)
    monkeypatch.delenv("DEADLY")
    with crew, asked(crew, clients=6) as (watch, clients):
        put(store, _deadly(), ROWS)
        lost = wait_for(lambda: crew.events("worker lost"), what="a worker lost")
        wait_for(lambda: crew.metric("emaswap_load_retries_total") > 0, what="a retry")
        put(store, Deadly(), ROWS)
        wait_for(lambda: watch.newest == 3, what="version 3")
        assert len(lost) == 1
        assert not watch.back
        # Each end loses a client one request at most; the next try comes only after a while.
        assert max(len(client.failures) for client in clients) <= len(crew.events("worker lost"))
        wait_for(lambda: crew.metric("emaswap_workers") == 3, what="three workers again")


@pytest.mark.long
def test_there_is_one_copy_of_the_weights(store: DirectoryStore) -> None:
    """What workers hold together is the weights once, and not once for each of them; so it is after many swaps."""
    module = Large()
    size = 4 * module.weight.numel()
    put(store, module, torch.rand(2, 3))
    with Crew(store.root, "--guard-s", "0", workers=3, fresh=True) as crew:
        crew.predict(ROW)
        steady = memory(crew)
        for version in range(2, 6):
            put(store, module, torch.rand(2, 3))
            crew.wait_until_live(version)
        crew.predict(ROW)
        wait_for(lambda: memory(crew) < steady + 1.5 * size, what="memory given back")
        shared = shared_memory(crew)
    assert size <= shared <= 2.1 * size


@pytest.mark.long
def test_a_load_that_hangs_in_a_worker_is_given_up(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The live version goes on answering, and a later version goes live."""
    put(store, Deadly(), ROWS)
    monkeypatch.setenv("DEADLY", "hang")
    crew = Crew(store.root, "--load-timeout-s", "1")
    monkeypatch.delenv("DEADLY")
    with crew:
        put(store, _deadly(), ROWS)
        wait_for(lambda: crew.metric("emaswap_load_retries_total") > 0, what="a load given up")
        assert crew.predict(ROW).headers["X-Model-Version"] == "1"
        put(store, Deadly(), ROWS)
        crew.wait_until_live(3)
        assert crew.predict(ROW).headers["X-Model-Version"] == "3"


def test_when_the_supervisor_is_killed_all_are_gone(store: DirectoryStore, publish: Publish) -> None:
    """Within a second nobody listens and no process is left, not even one that was stopped."""
    publish()
    with Crew(store.root) as crew:
        pids = list(crew.pids().values())
        os.kill(pids[0], signal.SIGSTOP)
        crew.process.send_signal(signal.SIGKILL)
        until = time.monotonic() + 1
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), timeout_s=1, what="the workers' end")
        wait_for(lambda: _is_free(crew.port), timeout_s=until - time.monotonic(), what="the port")


def test_one_sigterm_drains_all(store: DirectoryStore, publish: Publish) -> None:
    """Requests in flight are answered, later ones refused by nobody's crash, and the end is 0."""
    publish()
    crew = Crew(store.root, "--drain-s", "2")
    pids = list(crew.pids().values())
    with asked(crew) as (watch, clients):
        wait_for(lambda: all(client.answers for client in clients), what="answers")
        crew.process.send_signal(signal.SIGTERM)
        assert crew.process.wait(10) == 0
        watch.over.set()
    assert crew.stop() == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    reset = [failure for client in clients for failure in client.failures if "Connect" not in failure]
    assert not reset
    assert not any("Traceback" in line or "exception" in line for line in crew.lines)


def test_pins_reach_the_supervisor(store: DirectoryStore, publish: Publish, tmp_path: Path) -> None:
    """An order given to any worker holds for all, and the refusal of a later version says so."""
    (tmp_path / "token").write_text("correct horse")
    for _ in range(2):
        publish()
    with Crew(store.root, "--admin-token-file", str(tmp_path / "token")) as crew:
        crew.wait_until_live(2)
        assert crew.client.post("/model/pin", json={"version": 1}, headers=ADMIN).json()["live"] == 1
        for _ in range(8):
            with httpx.Client(base_url=crew.url, timeout=20) as client:
                assert client.post("/predict", json={"inputs": ROW}).headers["X-Model-Version"] == "1"
                refused = client.post("/predict", json={"inputs": ROW}, headers={"X-Min-Model-Version": "2"})
                assert (refused.status_code, refused.json()["reason"]) == (412, "ordered")
        assert crew.client.delete("/model/pin", headers=ADMIN).json()["live"] == 2
        assert crew.client.post("/model/pin", json={"version": 1}).status_code == 401
        assert crew.client.get("/no/such/path").json()["error"] == "not_found"
        assert crew.client.get("/predict").status_code == 405
        assert crew.client.head("/readyz").status_code == 200


def test_behind_a_proxy_the_schema_is_found(store: DirectoryStore, publish: Publish) -> None:
    """The path that a proxy takes off is known to the pages that the supervisor makes, and in nobody's way."""
    publish()
    with Crew(store.root, "--root-path", "/models/") as crew:
        assert '"/models/openapi.json"' in crew.client.get("/docs").text.replace("'", '"')
        assert crew.client.get("/openapi.json").status_code == 200
        assert crew.client.get("/model/version").json()["version"] == 1
        assert crew.predict(ROW).status_code == 200


def test_connections_are_shared_out(store: DirectoryStore, publish: Publish) -> None:
    """Of connections that stay, each worker gets its part."""
    publish()
    with Crew(store.root) as crew:
        kept = []
        for _ in range(16):
            kept.append(socket.create_connection(("127.0.0.1", crew.port)))
            time.sleep(0.01)
        held = [_connections(pid) for pid in crew.pids().values()]
        for each in kept:
            each.close()
        assert sum(held) >= 16
        assert max(held) - min(held) <= 2, held


def test_a_unix_socket_can_be_shared(store: DirectoryStore, publish: Publish, tmp_path: Path) -> None:
    """Workers behind a Unix socket answer, and the socket is gone when they are."""
    publish()
    path = tmp_path / "socket"
    service = ServiceProcess(store.root, "--workers", "2", *FLAGS, "--uds", str(path), wait=False)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://service", timeout=20) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200, what="ready")
        assert client.post("/predict", json={"inputs": ROW}).status_code == 200
    assert service.stop() == 0
    assert not path.exists()


def _deadly() -> Deadly:
    module = Deadly()
    with torch.no_grad():
        module.weight.fill_(2000)
    return module


def _is_free(port: int) -> bool:
    with socket.socket() as listener, suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        return True
    return False


def _connections(pid: int) -> int:
    found = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found += entry.readlink().name.startswith("socket:")
    return found
