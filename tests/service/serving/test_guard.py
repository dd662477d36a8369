"""A version that passed its proof and fails while it answers, while the one before it is kept ready."""

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from emaswap import DirectoryStore
from tests.faulty_models import BREAKS, HANGS, TRUST, Fragile, Moody
from tests.service.web.test_predict import ROWS, put
from tests.serving import ADMIN, Served, ServiceProcess, serve, wait_for

FLAGS = [flag for pattern in TRUST for flag in ("--trust", pattern)]


def publish(store: DirectoryStore, below: float) -> None:
    """A `Fragile` as the next version; its probe, between 0 and 1, is answered by all of them."""
    put(store, Fragile(below), torch.rand(4, 3))


@contextmanager
def guarded(store: DirectoryStore, **settings: Any) -> Iterator[Served]:
    """A service with a guard."""
    with serve(store=str(store.root), trust=TRUST, **({"poll_s": 0.05, "guard_s": 60} | settings)) as served:
        served.wait_until_live(store.newest())
        yield served


def test_nans_are_taken_back_within_their_batch(store: DirectoryStore) -> None:
    """The request is answered by the version before, which goes on; the new one is rejected with its reason."""
    publish(store, 1e9)
    with guarded(store) as served:
        publish(store, 5)
        served.wait_until_live(2)
        assert served.predict([[1, 0, 0]]).headers["X-Model-Version"] == "2"
        answer = served.predict([[1, 0, 0], [7, 0, 0]])
        assert answer.status_code == 200, answer.text
        assert answer.json()["outputs"] == [[1], [7]]
        assert answer.headers["X-Model-Version"] == "1"
        state = served.wait_until_rejected(2)
        assert state["reason"] == "answers_not_finite"
        assert served.live() == 1
        assert served.states()[1]["state"] == "live"
        assert served.metric("emaswap_rollbacks_total") == 1
        assert served.metric("emaswap_live_version") == 1
        publish(store, 1e9)
        served.wait_until_live(3)


def test_a_version_that_breaks_is_replaced_at_once(store: DirectoryStore) -> None:
    """Nobody is told that no version is live. The request that broke the new one is not tried on the one before."""
    put(store, Moody(), ROWS)
    with guarded(store, poll_s=3600) as served:
        put(store, Moody(), ROWS)
        served.wait_until_live(2)
        statuses, stop = [], threading.Event()

        def ask() -> None:
            while not stop.is_set():
                statuses.append(served.predict([[0, 0.5, 1]]).status_code)

        asking = threading.Thread(target=ask)
        asking.start()
        answer = served.predict([[float(BREAKS), 0.5, 1]])  # alone, while the others wait
        wait_for(lambda: served.live() == 1, what="version 1 live again")
        stop.set()
        asking.join()
        assert set(statuses) == {200}
        assert answer.status_code == 503
        assert answer.json()["error"] == "version_changed"


@pytest.mark.usefixtures("hanging")
def test_a_version_that_breaks_after_it_was_replaced_stays_away(store: DirectoryStore) -> None:
    """Its request is refused, those behind it are answered by the live version, and it does not come back for that one."""
    put(store, Moody(), ROWS)
    with guarded(store, forward_timeout_s=1) as served, ThreadPoolExecutor(4) as pool:
        hanging = pool.submit(served.predict, [[float(HANGS), 0.5, 1]])
        time.sleep(0.2)  # the first forward pass of a version runs on a thread
        put(store, Moody(), ROWS)
        served.wait_until_live(2)
        behind = [pool.submit(served.predict, [[0, 0.5, 1]]) for _ in range(3)]
        assert hanging.result().json()["error"] == "forward_timeout"
        assert [each.result().headers["X-Model-Version"] for each in behind] == ["2"] * 3
        assert served.states()[1]["reason"] == "forward_timeout"
        assert served.metric("emaswap_rollbacks_total") == 0
        served.predict([[float(BREAKS), 0.5, 1]])
        assert served.states()[2]["state"] == "rejected"
        assert served.metric("emaswap_live_version") == 0
        assert served.predict([[0, 0.5, 1]]).json()["error"] == "no_live_version"


def test_what_the_version_before_cannot_answer_either_is_no_fault(store: DirectoryStore) -> None:
    """NaNs that are in the nature of the model, or of the input, are sent as null, and the version stays."""
    publish(store, 1e9)
    with guarded(store) as served:
        publish(store, 5)
        served.wait_until_live(2)
        answer = served.predict([[-1, 0, 0]])
        assert answer.json()["outputs"] == [[None]]
        assert answer.headers["X-Model-Version"] == "2"
        assert served.live() == 2


def test_versions_in_quick_succession_are_compared_with_one_that_has_stood_the_test(store: DirectoryStore) -> None:
    """A version is not taken for good because the one before it, which nobody has trusted yet, fails as it does."""
    publish(store, 1e9)
    with guarded(store) as served:
        for version in (2, 3, 4):
            publish(store, 5)
            served.wait_until_live(version)
        answer = served.predict([[7, 0, 0]])
        assert answer.json()["outputs"] == [[7]]
        assert answer.headers["X-Model-Version"] == "1"
        assert served.wait_until_rejected(4)["reason"] == "answers_not_finite"


@pytest.mark.parametrize("guard_s", [0, 0.2])
def test_without_a_guard_the_version_before_is_freed(store: DirectoryStore, guard_s: float) -> None:
    """What is not kept takes no memory, and NaNs are sent as null."""
    publish(store, 1e9)
    with guarded(store, guard_s=guard_s) as served:
        publish(store, 5)
        served.wait_until_live(2)
        wait_for(lambda: served.states()[1]["state"] == "retired", what="version 1 freed")
        assert served.predict([[7, 0, 0]]).json()["outputs"] == [[None]]
        assert served.live() == 2


def test_an_order_is_not_taken_back(store: DirectoryStore, tmp_path: Any) -> None:
    """What an operator has pinned stays, whatever it answers."""
    (tmp_path / "token").write_text("correct horse")
    publish(store, 1e9)
    with guarded(store, admin_token_file=tmp_path / "token") as served:
        publish(store, 5)
        served.wait_until_live(2)
        assert served.client.post("/model/pin", json={"version": 2}, headers=ADMIN).status_code == 200
        assert served.predict([[7, 0, 0]]).json()["outputs"] == [[None]]
        assert served.live() == 2


def test_under_load_no_client_sees_a_nan(store: DirectoryStore) -> None:
    """Sixteen clients at once, of whom some send what the new version fails at: every answer is a number."""
    publish(store, 1e9)
    with ServiceProcess(store.root, *FLAGS, "--poll-s", "0.05") as service:
        wrong: list[Any] = []
        stop = threading.Event()

        def ask(client: int) -> None:
            with Served(service.url).client as connection:
                for number in itertools.count():
                    if stop.is_set():
                        return
                    first = float(number % 10)
                    answer = connection.post("/predict", json={"inputs": [[first, client, 0]]})
                    if answer.status_code != 200 or answer.json()["outputs"] != [[first]]:
                        wrong.append(answer.json())

        asking = [threading.Thread(target=ask, args=(client,)) for client in range(16)]
        for thread in asking:
            thread.start()
        for version in (2, 3, 4):
            publish(store, 5)
            service.wait_until_rejected(version)
        stop.set()
        for thread in asking:
            thread.join()
        assert not wrong
        assert service.live() == 1
        assert service.metric("emaswap_rollbacks_total") == 3
