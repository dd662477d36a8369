"""Forward passes that fail: whose fault it was, and what becomes of the others."""

import copy
import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import structlog
import torch

from emaswap import BadVersion, DirectoryStore, Signature, TensorField
from service.refusal import MAX_DETAIL
from service.serving.servable import Servable
from tests import faulty_models
from tests.faulty_models import (
    ALLOCATES,
    BREAKS,
    COMPLEX,
    HANGS,
    NOTHING,
    TRUST,
    Keeping,
    Moody,
    Overwriting,
    Pair,
)
from tests.models import Linear
from tests.odd import connect
from tests.service.web.test_predict import ROWS, assert_refused, head, put
from tests.serving import Served, serve, wait_for

GOOD = [0.0, 0.5, 1.0]
ANY_SIZE = Signature(inputs=(TensorField(name="x", shape=(3,)),), outputs=(TensorField(name="y", shape=(None,)),))


@contextmanager
def serving(store: DirectoryStore, **settings: Any) -> Iterator[Served]:
    """A service over a store, ready, which only a notification makes look at the store."""
    with serve(store=str(store.root), trust=TRUST, **({"poll_s": 3600} | settings)) as served:
        served.wait_until_live(store.newest())
        yield served


@pytest.fixture(scope="module")
def moody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service of `Moody`, for requests that leave it as it is."""
    store = DirectoryStore(tmp_path_factory.mktemp("moody"))
    put(store, Moody(), ROWS, ANY_SIZE)
    with serving(store) as served:
        yield served


def row(first: float) -> list[float]:
    """A row that makes `Moody` fail, or not."""
    return [float(first), 0.5, 1.0]


def failures(served: Served, cause: str) -> float:
    """How many forward passes failed by this cause."""
    return served.metric(f'emaswap_forward_failures_total{{cause="{cause}"}}')


def submit(threads: ThreadPoolExecutor, served: Served, request: list[list[float]]) -> "Future[httpx.Response]":
    """Send a request on a thread, and return once its batch is running."""
    batches = served.metric("emaswap_batch_rows_count")
    answer = threads.submit(served.predict, request)
    wait_for(lambda: served.metric("emaswap_batch_rows_count") > batches, what="a running batch")
    return answer


def together(served: Served, requests: list[list[list[float]]]) -> list[httpx.Response]:
    """The answers to requests that all wait while another one runs, so that they make one batch.

    They come from clients that have not sent anything yet.
    """
    live = served.service.slot.current
    assert live is not None
    with httpx.Client(base_url=served.url, timeout=30) as fresh, ThreadPoolExecutor(len(requests) + 1) as threads:
        with live._turn:  # nothing runs
            first = submit(threads, served, [GOOD])
            answers: list[Future[httpx.Response]] = []
            for request in requests:
                answers.append(threads.submit(fresh.post, "/predict", json={"inputs": request}))
                wait_for(lambda: served.metric("emaswap_waiting_requests") == len(answers), what="a waiting request")
        assert first.result(30).status_code == 200
        return [answer.result(30) for answer in answers]


# -- one thread at a time -----------------------------------------------------------------------------------------------


def test_a_module_is_run_by_one_thread_at_a_time(store: DirectoryStore) -> None:
    """While versions go by, each proven on its own probe, a module that keeps things on `self` mixes no two inputs."""
    put(store, Keeping(), ROWS)
    with serving(store, poll_s=0.05) as served:
        stop = threading.Event()

        def publish() -> None:
            while not stop.is_set():
                module = Keeping()
                torch.nn.init.eye_(module.layer.weight)
                torch.nn.init.zeros_(module.layer.bias)
                put(store, module, torch.rand(4, 3))

        publish_one = threading.Thread(target=publish)
        publish_one.start()
        try:
            served.wait_until_live(2)
            wrong = []
            for index in range(150):
                answer = served.predict([[float(index), -float(index), 1.0]])
                assert answer.status_code == 200, answer.text
                if answer.json()["outputs"] != [[index, -index]]:
                    wrong.append(answer.json())
        finally:
            stop.set()
            publish_one.join()
        assert served.metric("emaswap_swaps_total") > 5
        assert not wrong


def test_answers_are_not_written_over(store: DirectoryStore) -> None:
    """A module that writes all of its answers into one piece of memory gives each client its own."""
    put(store, Overwriting(), ROWS)
    with serving(store) as served, ThreadPoolExecutor(8) as threads:

        def ask(client: int) -> list[object]:
            rows = [[float(client), float(index), 0.0] for index in range(8)]
            return [answer for _ in range(20) if (answer := served.predict(rows).json()["outputs"]) != rows]

        assert [wrong for result in threads.map(ask, range(8)) for wrong in result] == []


# -- the request's fault ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first", [10, 11, 12, 13, 14, 15, 16], ids=lambda first: type(faulty_models.FAILURES[first]).__name__
)
def test_whatever_forward_raises_for_a_request_is_its_own(moody: Served, first: int) -> None:
    """The version still answers its probe, so it stays; the client is told what was raised, in few words, and which row."""
    before = failures(moody, "request")
    answer = moody.predict([GOOD, GOOD, row(first), GOOD, GOOD])
    detail = assert_refused(answer, 422, "model_refused")
    assert detail.startswith("row 2: the model cannot take these inputs: ")
    assert type(faulty_models.FAILURES[first]).__name__ in detail
    assert len(detail) <= MAX_DETAIL
    assert moody.predict([GOOD]).status_code == 200
    assert moody.live() == 1
    assert failures(moody, "request") == before + 1


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
def test_the_row_at_fault_is_found(moody: Served, rows: int) -> None:
    """Wherever among its rows the bad one is, the refusal names it."""
    for bad in range(rows):
        request = [row(10) if index == bad else GOOD for index in range(rows)]
        assert f"row {bad}: " in assert_refused(moody.predict(request), 422, "model_refused")


def test_rows_that_fail_only_together_are_not_blamed_alone(store: DirectoryStore) -> None:
    """Where no single row is at fault, none is named."""
    put(store, Pair(), ROWS)
    with serving(store) as served:
        detail = assert_refused(served.predict([row(index) for index in range(5)]), 422, "model_refused")
        assert detail == "the model cannot take these inputs: ValueError: all of them differ"


def test_a_bad_request_costs_its_neighbours_one_further_run(moody: Served) -> None:
    """Of a batch of many, the bad ones are refused and the others answered, after two forward passes each at most."""
    before = failures(moody, "request")
    requests = [[row(10)] if index in (3, 11) else [row(-100 - index)] for index in range(16)]
    live = moody.service.slot.current
    assert live is not None
    seen: list[float] = []
    hook = live.module.register_forward_pre_hook(lambda _, rows: seen.extend(rows[0][:, 0].tolist()))
    answers = together(moody, requests)
    hook.remove()
    assert [answer.status_code for answer in answers] == [422 if index in (3, 11) else 200 for index in range(16)]
    for request, answer in zip(requests, answers, strict=True):
        if answer.status_code == 200:
            torch.testing.assert_close(torch.tensor(answer.json()["outputs"]), live.module(torch.tensor(request)))
    assert {seen.count(request[0][0]) for request in requests if request != [row(10)]} == {2}
    assert failures(moody, "request") == before + 2


def test_a_client_that_sends_bad_requests_all_the_time_runs_alone(moody: Served) -> None:
    """After its first bad request, its next ones cost their neighbours no further run; good ones are still answered."""
    live = moody.service.slot.current
    assert live is not None
    with httpx.Client(base_url=moody.url) as bad, ThreadPoolExecutor(4) as threads:
        assert_refused(bad.post("/predict", json={"inputs": [row(10)]}), 422, "model_refused")
        seen: list[float] = []
        hook = live.module.register_forward_pre_hook(lambda _, rows: seen.extend(rows[0][:, 0].tolist()))
        for index in range(20):
            with live._turn:  # nothing runs
                first = submit(threads, moody, [GOOD])
                neighbour = threads.submit(moody.predict, [row(-100 - index)])
                wait_for(lambda: moody.metric("emaswap_waiting_requests") == 1, what="a waiting request")
                again = threads.submit(bad.post, "/predict", json={"inputs": [row(10)]})
                wait_for(lambda: moody.metric("emaswap_waiting_requests") == 2, what="two waiting requests")
            assert first.result(30).status_code == neighbour.result(30).status_code == 200
            assert_refused(again.result(30), 422, "model_refused")
        hook.remove()
        assert {seen.count(-100 - index) for index in range(20)} == {1}
        answer = bad.post("/predict", json={"inputs": [row(-500)]})
        torch.testing.assert_close(torch.tensor(answer.json()["outputs"]), live.module(torch.tensor([row(-500)])))


def test_refusals_of_the_model_are_logged_at_a_limited_rate(store: DirectoryStore) -> None:
    """However many bad requests come, few lines are written; each of them is counted."""
    put(store, Moody(), ROWS, ANY_SIZE)
    with serving(store) as served, structlog.testing.capture_logs() as lines:
        for _ in range(20):
            served.predict([row(10)])
        assert failures(served, "request") == 20
    assert [line["event"] for line in lines].count("forward pass failed") == 1


@pytest.mark.parametrize("first", [COMPLEX, NOTHING], ids=["complex numbers", "no number at all"])
@pytest.mark.parametrize("labels", [None, ("a", "b")], ids=["plain", "labelled"])
def test_outputs_that_are_no_numbers_are_refused(
    store: DirectoryStore, first: int, labels: tuple[str, ...] | None
) -> None:
    """Complex outputs, and rows without any number where labels wait for one, are a clear 422."""
    put(store, Moody(), ROWS, ANY_SIZE.model_copy(update={"labels": labels}))
    with serving(store) as served:
        answer = served.predict([GOOD, row(first)])
        if first == NOTHING and labels is None:
            assert answer.json()["outputs"] == [[], []]
        else:
            detail = assert_refused(answer, 422, "model_refused")
            assert ("complex64" if first == COMPLEX else "0 outputs a row for 2 labels") in detail
        assert served.predict([GOOD]).status_code == 200


# -- our own fault ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [20, 21, 22, 23, 24, ALLOCATES], ids=str)
def test_memory_that_ran_out_is_our_own_fault(moody: Served, first: int) -> None:
    """503 with Retry-After, counted and logged; the version stays, and answers when there is memory again."""
    memory, request = failures(moody, "memory"), failures(moody, "request")
    answer = moody.predict([row(first)])
    assert "memory" in assert_refused(answer, 503, "out_of_memory")
    assert int(answer.headers["Retry-After"]) >= 1
    assert failures(moody, "memory") == memory + 1
    assert failures(moody, "request") == request
    assert moody.predict([GOOD]).status_code == 200
    assert moody.live() == 1


def test_a_batch_too_large_for_memory_is_run_in_parts(moody: Served) -> None:
    """Only the request that has no memory even alone is refused; those in its batch are answered."""
    answers = together(moody, [[GOOD], [row(20)], [GOOD]])
    assert [answer.status_code for answer in answers] == [200, 503, 200]


# -- the version's fault ------------------------------------------------------------------------------------------------


def test_a_broken_version_is_taken_back(store: DirectoryStore) -> None:
    """A version that no longer answers its own probe is rejected with the reason, and the one before it is live again."""
    put(store, Linear(), ROWS)
    put(store, Moody(), ROWS)
    with serving(store) as served:
        answer = served.predict([row(BREAKS)])
        assert answer.status_code in (200, 503), answer.text
        served.wait_until_live(1)
        assert served.predict([row(BREAKS)]).headers["X-Model-Version"] == "1"
        state = served.states()[2]
        assert state["state"] == "rejected"
        assert state["reason"] == "probe_failed"
        assert "this module is broken" in state["detail"]
        assert failures(served, "version") == 1
        assert failures(served, "request") == 0


def test_a_version_that_breaks_leaves_nobody_without_an_answer(store: DirectoryStore) -> None:
    """Without a version to take its place, the batch and all who ask later are told to come again."""
    put(store, Moody(), ROWS)
    with serving(store) as served:
        for answer in together(served, [[GOOD], [row(BREAKS)], [GOOD]]):
            assert_refused(answer, 503, "no_live_version")
            assert answer.headers["Retry-After"]
        assert served.client.get("/readyz").status_code == 503
        assert_refused(served.predict([GOOD]), 503, "no_live_version")
        third = put(store, Linear(), ROWS)
        served.client.get("/healthz")
        served.wait_until_live(third.version)
        assert served.predict([GOOD]).status_code == 200


def test_a_broken_version_is_not_tried_with_each_request(store: DirectoryStore) -> None:
    """After a batch has failed the probe is asked first: where it fails, too, none of the batch is run alone."""
    put(store, Moody(), ROWS)
    with serving(store) as served:
        live = served.service.slot.current
        assert live is not None
        assert isinstance(live.module, Moody)
        live.module.broken = True
        runs: list[int] = []
        live.module.register_forward_pre_hook(lambda _, rows: runs.append(len(rows[0])))
        with live._turn, ThreadPoolExecutor(8) as threads:
            first = submit(threads, served, [GOOD])
            others = [threads.submit(served.predict, [GOOD]) for _ in range(7)]
            wait_for(lambda: served.metric("emaswap_waiting_requests") == 7, what="waiting requests")
            live._turn.release()
            answers = [other.result(30) for other in [first, *others]]
            live._turn.acquire()
        assert [answer.status_code for answer in answers] == [503] * 8
        assert runs == [1, len(ROWS)]


def test_bad_requests_cost_a_batch_two_proofs(moody: Served) -> None:
    """However many of a batch are bad, the probe is replayed twice at most."""
    live = moody.service.slot.current
    assert live is not None
    runs: list[int] = []
    hook = live.module.register_forward_pre_hook(lambda _, rows: runs.append(len(rows[0])))
    answers = together(moody, [[row(10)]] * 9)
    hook.remove()
    assert [answer.status_code for answer in answers] == [422] * 9
    assert runs == [1, 9, len(ROWS), *[1] * 9, len(ROWS)]


def test_without_memory_for_the_probe_nobody_is_blamed(moody: Served) -> None:
    """Where the probe runs out of memory, a request that failed is told to come again, and the version stays."""
    live = moody.service.slot.current
    assert live is not None

    def run_out(_: object, rows: tuple[torch.Tensor]) -> None:
        if len(rows[0]) == len(ROWS):
            raise MemoryError

    hook = live.module.register_forward_pre_hook(run_out)
    answer = httpx.post(f"{moody.url}/predict", json={"inputs": [row(10)]})  # by a client that has done no wrong yet
    hook.remove()
    assert_refused(answer, 503, "out_of_memory")
    assert moody.live() == 1
    assert_refused(moody.predict([row(10)]), 422, "model_refused")


def test_a_request_cannot_break_version_after_version(store: DirectoryStore) -> None:
    """One that breaks by itself what runs it is tried on no other; its neighbours in a batch are answered by the next."""
    put(store, Moody(), ROWS)
    with serving(store) as served:
        batcher, slot = served.service.answering.batcher, served.service.slot
        whole = copy.deepcopy(slot.current.module) if slot.current else Moody()
        broken: list[Servable] = []

        def take_the_next(servable: Servable, _: BadVersion) -> None:
            broken.append(servable)
            slot.swap(dataclasses.replace(servable, module=copy.deepcopy(whole)))

        batcher._on_broken = take_the_next
        assert_refused(served.predict([row(BREAKS)]), 503, "version_changed")
        assert len(broken) == 1
        answers = together(served, [[GOOD], [GOOD], [row(BREAKS)]])
        assert [answer.status_code for answer in answers] == [200, 200, 503]


# -- a forward pass that hangs ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hanging")
def test_a_forward_pass_that_hangs_is_given_up(store: DirectoryStore) -> None:
    """Its batch is told so, its version rejected, and the version before it answers on another thread."""
    put(store, Linear(), ROWS)
    put(store, Moody(), ROWS)
    with serving(store, forward_timeout_s=0.3) as served:
        began = time.monotonic()
        answer = served.predict([row(HANGS)])
        assert time.monotonic() - began < 5
        assert "0.3 s" in assert_refused(answer, 503, "forward_timeout")
        assert answer.headers["Retry-After"]
        served.wait_until_live(1)
        assert served.predict([row(HANGS)]).status_code == 200
        assert served.states()[2]["reason"] == "forward_timeout"
        assert failures(served, "timeout") == 1


@pytest.mark.usefixtures("hanging")
def test_a_service_in_which_a_forward_pass_hangs_is_not_ready_and_can_end(store: DirectoryStore) -> None:
    """Those who wait behind it are told that nothing is live; a new version makes the service ready; its end is quick."""
    put(store, Moody(), ROWS)
    with serving(store, forward_timeout_s=0.5) as served:
        with ThreadPoolExecutor(2) as threads:
            first = submit(threads, served, [row(HANGS)])
            second = threads.submit(served.predict, [GOOD])
            assert_refused(first.result(30), 503, "forward_timeout")
            assert_refused(second.result(30), 503, "no_live_version")
        assert served.client.get("/readyz").status_code == 503
        put(store, Linear(), ROWS)
        served.wait_until_live(2)
        assert served.predict([GOOD]).status_code == 200
        began = time.monotonic()
    assert time.monotonic() - began < 5


@pytest.mark.usefixtures("hanging")
def test_the_end_does_not_wait_for_a_hung_forward_pass(store: DirectoryStore) -> None:
    """A service that is told to end while a forward pass hangs, and its time is not yet up, ends all the same."""
    put(store, Moody(), ROWS)
    body = json.dumps({"inputs": [row(HANGS)]}).encode()
    with serving(store) as served:
        with connect(served) as connection:
            connection.sendall(head(f"Content-Length: {len(body)}") + body)
            wait_for(lambda: served.metric("emaswap_batch_rows_count") == 1, what="a running batch")
        began = time.monotonic()
    assert time.monotonic() - began < 5
