"""Real processes together: publishers, services, clients, and what happens when they are killed."""

import http.client
import json
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

from emaswap import Architecture, DirectoryStore, Fenced, ModelEMA, Publisher
from emaswap.versions import proof
from tests.models import Everything, Everywhere, Linear, Slow
from tests.programs import Program, run
from tests.serving import ADMIN, ServiceProcess, wait_for
from tests.soak import record, times

CLIENTS = 16
HEADING = "version digest\n"


class Client:
    """One connection that asks all the while and checks each answer against itself and the ones before it."""

    def __init__(self, url: str, stop: threading.Event) -> None:
        self.problems: list[str] = []
        self.digests: dict[int, str] = {}
        self.answers = 0
        self._stop = stop
        self._url = urlsplit(url)
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        assert self._url.hostname is not None
        connection = http.client.HTTPConnection(self._url.hostname, self._url.port, timeout=30)
        last = 0
        while not self._stop.is_set():
            connection.request("POST", "/predict", b'{"inputs": [[1, 2]]}', {"Content-Type": "application/json"})
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                self.problems.append(f"{response.status} {body!r}")
                continue
            answer = json.loads(body)
            version = answer["model"]["version"]
            if set(answer["outputs"][0]) != {float(version)}:
                self.problems.append(f"version {version} answered {answer['outputs']}")
            if response.headers["X-Model-Version"] != str(version) or version < last:
                self.problems.append(f"version {version}, after {last}, header {response.headers['X-Model-Version']}")
            if self.digests.setdefault(version, answer["model"]["digest"]) != response.headers["X-Model-Digest"]:
                self.problems.append(f"version {version} has two digests")
            last = version
            self.answers += 1
        connection.close()


@pytest.mark.parametrize(
    "versions", [200, pytest.param(times(2000), marks=[pytest.mark.soak, pytest.mark.timeout(1200)])]
)
def test_no_answer_fails_or_mixes_versions_while_versions_race_by(tmp_path: Path, versions: int) -> None:
    """Under 16 clients, versions as fast as the store takes them: each answer is whole, and made by whom it names."""
    store = tmp_path / "store"
    publishing = ("-m", "tests.publisher_process", str(store))
    first = run(*publishing, "1", check=True)
    with ServiceProcess(store) as service:
        stop = threading.Event()
        clients = [Client(service.url, stop) for _ in range(CLIENTS)]
        for client in clients:
            client.thread.start()
        rest = run(*publishing, str(versions - 1), check=True)
        service.wait_until_live(versions)
        answered = sum(client.answers for client in clients)
        wait_for(lambda: sum(client.answers for client in clients) > answered + CLIENTS, what="answers by the last")
        stop.set()
        for client in clients:
            client.thread.join()
        rejected = service.events("version rejected")

    lines = [line for part in (first, rest) for line in part.stdout.removeprefix(HEADING).splitlines()]
    published = dict(line.split() for line in lines)
    assert len(published) == versions
    problems = [problem for client in clients for problem in client.problems]
    seen = {version: digest for client in clients for version, digest in client.digests.items()}
    answers = sum(client.answers for client in clients)
    record("versions racing by", published=versions, served=len(seen), answers=answers, failed=len(problems))
    assert problems == []
    assert {str(version): digest for version, digest in seen.items()}.items() <= published.items()
    assert versions in seen
    assert len(seen) >= 5
    assert rejected == []


@pytest.mark.parametrize("kills", [100, pytest.param(times(4000), marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_a_publisher_killed_at_any_instant_leaves_the_store_whole(tmp_path: Path, kills: int) -> None:
    """After each kill the newest version is proven right, and the next publisher goes on behind it."""
    store = DirectoryStore(tmp_path / "store")
    store.prepare()
    randomly = random.Random(1)
    terms: set[int] = set()
    newest, cut_short = 0, 0
    for _ in range(kills):
        publishing = Program("-m", "tests.publisher_process", str(store.root), str(10**6), stdout=subprocess.PIPE)
        assert publishing.stdout is not None
        with publishing.stdout:
            assert publishing.stdout.readline() == HEADING
            time.sleep(randomly.uniform(0, 0.15))
            publishing.kill()
            assert publishing.wait() == -signal.SIGKILL
        versions = store.versions()
        assert max(versions, default=0) >= newest
        newest = max(versions, default=0)
        cut_short += bool(store.files.entries("tmp"))
        for name in store.files.entries("tmp"):
            store.files.delete(f"tmp/{name}")
        if not newest:
            continue
        manifest = store.manifest(newest)
        fetched = store.fetch(manifest)
        module = proof.verify(manifest, fetched, trusted=["tests.models.*"], device=torch.device("cpu"))
        proof.replay(manifest, fetched.probe, module, device=torch.device("cpu"))
        assert manifest.term >= max(terms, default=0)
        terms.add(manifest.term)
    record("killed publishers", kills=kills, published=newest, terms=len(terms), left_a_part=cut_short)
    assert len(terms) > kills / 10
    assert cut_short > kills / 40


def test_of_two_publishers_at_once_the_older_stops(tmp_path: Path) -> None:
    """The older publisher is told that it was fenced; every version stays readable and in one line."""
    location = tmp_path / "store"
    probe = torch.zeros(1, 2)

    def publisher() -> Publisher:
        return Publisher(location, name="everywhere", architecture=Architecture.of(Everywhere), probe=probe, keep=99)

    older = publisher()
    older.publish(Everywhere(value=1))
    older.flush()
    newer = publisher()
    newer.publish(Everywhere(value=2))
    newer.flush()
    older.publish(Everywhere(value=-1))
    with pytest.raises(Fenced, match="another publisher has taken over"):
        older.flush()
    with pytest.raises(Fenced):
        older.publish(Everywhere(value=-1))
    newer.publish(Everywhere(value=3))
    newer.close()
    with pytest.raises(Fenced):
        older.close()
    manifests = [newer.store.manifest(version) for version in newer.store.versions()]
    assert [manifest.term for manifest in manifests] == [1, 2, 2]


def test_the_served_model_is_the_ema_to_the_last_bit(tmp_path: Path) -> None:
    """Batch norm, integer buffers, tied weights and non-persistent buffers come out right: equal outputs, bit for bit."""
    torch.manual_seed(3)
    model = Everything()
    ema = ModelEMA(model, decay=0.9, tau=5)
    rows = torch.randn(5, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Publisher(
        tmp_path / "store", name="everything", architecture=Architecture.of(Everything), probe=rows[:2]
    ) as publisher:
        for _ in range(20):
            model.train()
            model(torch.randn(16, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model)
        publisher.publish(ema, step=20)
    assert ema.ema.get_buffer("steps") == 20
    with ServiceProcess(tmp_path / "store", "--threads", "1") as service:
        answer = service.predict(rows.tolist()).json()
    with torch.no_grad():
        expected = ema.ema(rows).numpy()
    np.testing.assert_array_equal(np.asarray(answer["outputs"], dtype=np.float32), expected, strict=True)


def test_trainer_and_service_work_as_two_commands_in_either_order(tmp_path: Path) -> None:
    """A service started before the store exists follows the trainer; one started afterwards serves what is there."""
    store = tmp_path / "store"
    trainer = ("-m", "trainer", "--store", str(store), "--task", "digits", "--seed", "1")
    with ServiceProcess(store, wait=False, fresh=True) as early:
        not_ready = early.client.get("/readyz")
        assert not_ready.status_code == 503
        assert "does not exist" in not_ready.json()["reason"]
        run(*trainer, "--steps", "300", "--publish-every", "50", check=True, fresh=True)
        early.wait_until_live(6)
        with ServiceProcess(store) as late:
            versions = [service.client.get("/model/version").json() for service in (early, late)]
            rows = [[[[0.5] * 8] * 8]]
            answers = [service.predict(rows).json() for service in (early, late)]
    assert versions[0]["digest"] == versions[1]["digest"]
    assert versions[0]["training"]["metrics"]["ema_accuracy"] >= 0.97
    assert versions[0]["ema"]["updates"] == versions[0]["step"] == 300
    assert answers[0] == answers[1]
    assert answers[0]["predictions"][0]["label"] in "0123456789"


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[Publisher]:
    """A publisher of `Linear` modules to tmp_path/store."""
    rows = torch.linspace(-1, 1, 12).view(4, 3)
    with Publisher(tmp_path / "store", name="test", architecture=Architecture.of(Linear), probe=rows) as publisher:
        yield publisher


def _next(publisher: Publisher) -> int:
    publisher.publish(Linear())
    publisher.flush()
    return publisher.store.newest()


def test_a_pin_holds_across_restarts_and_against_newer_versions(tmp_path: Path, publisher: Publisher) -> None:
    """What was pinned over HTTP is served until it is unpinned, also by a service that starts later or was killed."""
    token = tmp_path / "token"
    token.write_text("correct horse")
    for _ in range(3):
        _next(publisher)
    flags = ("--admin-token-file", str(token), "--poll-s", "0.1")
    with ServiceProcess(tmp_path / "store", *flags) as service:
        service.wait_until_live(3)
        pinned = service.client.post("/model/pin", json={"version": 2, "reason": "3 is odd"}, headers=ADMIN)
        assert pinned.status_code == 200, pinned.text
        assert pinned.json()["live"] == 2
        assert service.predict([[1, 2, 3]]).json()["model"]["version"] == 2
        _next(publisher)
        wait_for(lambda: service.metric("emaswap_newest_version") == 4)
        assert service.live() == 2
        service.stop(signal.SIGKILL)
    with ServiceProcess(tmp_path / "store", *flags) as service:
        assert service.live() == 2
        live = service.client.get("/model/version").json()
        assert live["pin"]["reason"] == "3 is odd"
        _next(publisher)
        wait_for(lambda: service.metric("emaswap_newest_version") == 5)
        assert service.live() == 2
        unpinned = service.client.delete("/model/pin", headers=ADMIN)
        assert unpinned.json()["live"] == 5
        assert service.predict([[1, 2, 3]]).json()["model"]["version"] == 5


def test_sigterm_lets_requests_finish_and_ends_with_0(tmp_path: Path) -> None:
    """After SIGTERM the service is not ready at once, answers what it has taken, and ends with 0."""
    rows = torch.zeros(1, 2)
    with Publisher(
        tmp_path / "store", name="slow", architecture=Architecture.of(Slow, seconds=0.8), probe=rows
    ) as publisher:
        publisher.publish(Slow(seconds=0.8))
    with ServiceProcess(tmp_path / "store", "--drain-s", "0.4") as service:
        statuses: list[int] = []
        asking = threading.Thread(target=lambda: statuses.append(service.predict([[1, 2]]).status_code))
        asking.start()
        wait_for(lambda: service.metric("emaswap_batch_rows_count") == 1)
        service.process.send_signal(signal.SIGTERM)
        wait_for(lambda: service.events("draining"))
        readiness = service.client.get("/readyz")
        asking.join()
        assert service.process.wait(30) == 0
    assert (readiness.status_code, readiness.json()["reason"]) == (503, "draining")
    assert statuses == [200]


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.3])
def test_a_killed_service_comes_back_to_the_newest_version(
    tmp_path: Path, publisher: Publisher, delay_s: float
) -> None:
    """SIGKILL at any instant leaves nothing behind that would keep the next service from serving."""
    first = _next(publisher)
    with ServiceProcess(tmp_path / "store") as service:
        service.wait_until_live(first)
        newest = _next(publisher)
        time.sleep(delay_s)
        service.stop(signal.SIGKILL)
    with ServiceProcess(tmp_path / "store") as service:
        assert service.live() == newest
        assert service.predict([[1, 2, 3]]).status_code == 200
