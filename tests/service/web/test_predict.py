"""POST /predict over HTTP: what is answered, what is refused, and that nothing a client sends stops the next answer."""

import asyncio
import json
import math
import socket
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue
from torch import nn

from emaswap import Architecture, DirectoryStore, Manifest, Publisher, Signature, TensorField
from emaswap.versions.signature import DType, Inputs
from service.serving.servable import Rows
from service.web.endpoint import Endpoint
from tests.models import EveryDtype, Linear, Same
from tests.odd import connect
from tests.serving import Served, serve, wait_for
from tests.slow_models import TRUST, Gated, GatedTokens, Logarithm, gate

TOKENS = Signature(
    inputs=(TensorField(name="tokens", dtype="int64", shape=(None,)), TensorField(name="bias")),
    outputs=(TensorField(name="logits", shape=(3,)), TensorField(name="mean", shape=(4,))),
)
TOKENS_PROBE = {"tokens": torch.tensor([[1, 2], [3, 4]]), "bias": torch.tensor([0.5, 1.0])}
ROWS = torch.linspace(-1, 1, 12).view(4, 3)
GOOD = [[1.0, 2.0, 3.0]]

Submit = Callable[..., "Future[httpx.Response]"]


def put(
    store: DirectoryStore, module: nn.Module, probe: Inputs, signature: Signature | None = None, **arguments: JsonValue
) -> Manifest:
    """Publish a module as the next version."""
    manifests: list[Manifest] = []
    architecture = Architecture.of(type(module), **arguments)
    with Publisher(
        store, name="test", architecture=architecture, probe=probe, signature=signature, on_publish=manifests.append
    ) as publisher:
        publisher.publish(module, step=7)
    return manifests[0]


@contextmanager
def serving(store: DirectoryStore, poll_s: float = 3600, **settings: Any) -> Iterator[Served]:
    """A service over a store, ready.

    It does not poll unless told to: the jitter of a poll would draw on the random numbers that Hypothesis watches over.
    """
    with serve(store=str(store.root), trust=TRUST, poll_s=poll_s, **settings) as served:
        served.wait_until_live(store.newest())
        yield served


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service of a `Linear` of three inputs, with low limits, for requests that leave it as it is."""
    store = DirectoryStore(tmp_path_factory.mktemp("linear"))
    put(store, Linear(), ROWS)
    with serving(store, max_body_bytes=20_000, max_batch_rows=8) as served:
        yield served


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service of `GatedTokens`."""
    store = DirectoryStore(tmp_path_factory.mktemp("tokens"))
    put(store, GatedTokens(), TOKENS_PROBE, TOKENS)
    with serving(store) as served:
        yield served


@pytest.fixture
def submit() -> Iterator[Submit]:
    """Runs a request on a thread of its own."""
    with ThreadPoolExecutor(16) as threads:
        yield threads.submit


def live_module(served: Served) -> nn.Module:
    """The module that answers."""
    live = served.service.slot.current
    assert live is not None
    return live.module


def head(*lines: str, path: str = "/predict") -> bytes:
    """The head of a POST request."""
    return "".join(line + "\r\n" for line in (f"POST {path} HTTP/1.1", "Host: test", *lines, "")).encode("latin-1")


def receive(connection: socket.socket) -> tuple[HTTPResponse, dict[str, Any]]:
    """The answer that comes on a connection."""
    with HTTPResponse(connection, method="POST") as response:
        response.begin()
        return response, json.loads(response.read())


def assert_refused(answer: httpx.Response, status: int, code: str) -> str:
    """The answer is a refusal, of the one shape that refusals have; its detail."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    body = answer.json()
    assert body.keys() - {"reason"} == {"error", "detail"}
    assert ("reason" in body) == (status == 412)
    assert body["error"] == code
    assert body["detail"]
    return str(body["detail"])


def assert_healthy(served: Served) -> None:
    """A good request is answered, as it always is."""
    answer = served.predict(GOOD)
    assert answer.status_code == 200, answer.text


# -- answers ------------------------------------------------------------------------------------------------------------


def test_an_answer_has_the_outputs_and_the_version_that_made_them(linear: Served) -> None:
    """One output comes as rows, in the order of the request, with name, version, step and digest beside it."""
    rows = torch.randn(5, 3)
    answer = linear.predict(rows.tolist())
    assert answer.status_code == 200
    body = answer.json()
    assert body.keys() == {"outputs", "model"}
    torch.testing.assert_close(torch.tensor(body["outputs"]), live_module(linear)(rows))
    live = linear.service.slot.current
    assert live is not None
    assert body["model"] == {"name": "test", "version": 1, "step": 7, "digest": live.digest}
    assert answer.headers["X-Model-Version"] == "1"
    assert answer.headers["X-Model-Digest"] == live.digest


def test_several_outputs_come_by_name(tokens: Served) -> None:
    """A model with several outputs answers with each under its name."""
    answer = tokens.predict({"tokens": [[1, 2, 3], [4, 5, 6]], "bias": [0.5, -0.5]})
    assert answer.status_code == 200
    outputs = answer.json()["outputs"]
    expected = live_module(tokens)(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([0.5, -0.5]))
    assert outputs.keys() == {"logits", "mean"}
    for name, rows in outputs.items():
        torch.testing.assert_close(torch.tensor(rows), expected[name])


def test_labels_make_predictions(store: DirectoryStore) -> None:
    """Where the signature has labels, each row has its likeliest label and the softmax probability of it."""
    labelled = Signature(
        inputs=(TensorField(name="x", shape=(3,)),), outputs=(TensorField(name="y", shape=(2,)),), labels=("cat", "dog")
    )
    put(store, Linear(), ROWS, labelled)
    with serving(store) as served:
        rows = torch.randn(6, 3)
        body = served.predict(rows.tolist()).json()
        logits = live_module(served)(rows)
        assert [prediction["label"] for prediction in body["predictions"]] == [
            ("cat", "dog")[index] for index in logits.argmax(dim=1).tolist()
        ]
        scores = [prediction["score"] for prediction in body["predictions"]]
        assert scores == pytest.approx(logits.softmax(dim=1).amax(dim=1).tolist(), rel=1e-5)


@pytest.fixture(scope="module")
def logarithm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service of logarithms of any number of numbers, with labels for two of them."""
    store = DirectoryStore(tmp_path_factory.mktemp("logarithm"))
    any_size = Signature(
        inputs=(TensorField(name="x", shape=(None,)),),
        outputs=(TensorField(name="y", shape=(None,)),),
        labels=("a", "b"),
    )
    put(store, Logarithm(), torch.ones(2, 2), any_size)
    with serving(store) as served:
        yield served


def test_an_output_that_is_not_finite_is_null(logarithm: Served) -> None:
    """JSON has neither NaN nor infinity: such an output, and a score of it, is null, and the rest is as it is."""
    body = logarithm.predict([[1, math.e], [-1, 1], [0, 0]]).json()
    assert body["outputs"] == [[0, pytest.approx(1)], [None, 0], [None, None]]
    assert [prediction["score"] is None for prediction in body["predictions"]] == [False, True, True]


@pytest.mark.parametrize("row", [[1.0, 2.0, 3.0], [1.0], []], ids=["too many", "too few", "none"])
def test_outputs_that_are_not_as_many_as_the_labels_are_no_server_error(logarithm: Served, row: list[float]) -> None:
    """Where a request decides how many outputs there are, other than there are labels is not the server's fault."""
    answer = logarithm.predict([row])
    assert answer.status_code < 500, answer.text
    assert logarithm.predict([[1, 2]]).status_code == 200


@pytest.mark.parametrize(
    "content_type",
    [
        pytest.param("application/json", id="as it should be"),
        pytest.param("application/json; charset=utf-8", id="with a parameter"),
        pytest.param("Application/JSON", id="in other letters"),
        pytest.param(None, id="not said"),
    ],
)
def test_json_is_taken_however_it_is_called(linear: Served, content_type: str | None) -> None:
    """The content type of JSON may be spelt in all its ways, or be left out."""
    headers = {"Content-Type": content_type} if content_type else {}
    answer = linear.client.post("/predict", content=json.dumps({"inputs": GOOD}).encode(), headers=headers)
    assert answer.status_code == 200


def test_a_body_in_many_small_pieces_is_one_body(linear: Served) -> None:
    """A body that arrives byte by byte, without its length said, is answered like any other."""
    body = json.dumps({"inputs": GOOD}).encode()
    pieces = (body[index : index + 1] for index in range(len(body)))
    answer = linear.client.post("/predict", content=pieces, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200
    assert answer.json()["outputs"] == linear.predict(GOOD).json()["outputs"]


def test_a_large_body_is_answered_like_a_small_one(store: DirectoryStore) -> None:
    """A body of hundreds of kilobytes gives the same answers as its rows one by one."""
    put(store, Linear(), ROWS)
    with serving(store, max_batch_rows=20_000) as served:
        rows = torch.randn(10_000, 3)
        outputs = served.predict(rows.tolist()).json()["outputs"]
        torch.testing.assert_close(torch.tensor(outputs), live_module(served)(rows))


EXTREMES: dict[str, list[Any]] = {
    "float64": [1.7976931348623157e308, -5e-324, 0.1],
    "float32": [3.4028234663852886e38, -1.401298464324817e-45, 0.5],
    "float16": [65504.0, -5.960464477539063e-08, 0.5],
    "bfloat16": [3.3895313892515355e38, -1.0, 0.5],
    "int64": [2**63 - 1, -(2**63), 0],
    "int32": [2**31 - 1, -(2**31), 0],
    "int16": [2**15 - 1, -(2**15), 0],
    "int8": [127, -128, 0],
    "uint8": [255, 0, 1],
    "boolean": [True, False, True],
}


@pytest.mark.parametrize("shape", [(), (3,), (None,)], ids=["single values", "a size", "any size"])
def test_every_dtype_goes_in_and_comes_out(store: DirectoryStore, shape: tuple[int | None, ...]) -> None:
    """The extremes of each dtype arrive in the model and in the answer as they are, in rows of no, one or any size."""
    dtypes = [name.replace("boolean", "bool") for name in EXTREMES]
    fields = [
        [
            TensorField.model_validate({"name": name + end, "dtype": dtype, "shape": shape})
            for name, dtype in zip(EXTREMES, dtypes, strict=True)
        ]
        for end in ("", "_out")
    ]
    signature = Signature(inputs=tuple(fields[0]), outputs=tuple(fields[1]))
    probe = {field.name: torch.ones(2, *(size or 3 for size in shape)).to(field.torch_dtype) for field in fields[0]}
    put(store, EveryDtype(), probe, signature)
    with serving(store) as served:
        rows = EXTREMES if shape == () else {name: [values, values[::-1]] for name, values in EXTREMES.items()}
        answer = served.predict(rows)
        assert answer.status_code == 200, answer.text
        outputs = answer.json()["outputs"]
        for name, values in rows.items():
            torch.testing.assert_close(torch.tensor(outputs[f"{name}_out"]), torch.tensor(values), rtol=1e-6, atol=0)
        if shape == (None,):
            empty = served.predict({name: [[], []] for name in EXTREMES})
            assert empty.json()["outputs"] == {f"{name}_out": [[], []] for name in EXTREMES}


@pytest.mark.parametrize("dtype", ["uint8", "int64", "bool", "float16"])
def test_logits_of_any_dtype_make_predictions(store: DirectoryStore, dtype: DType) -> None:
    """Whole numbers do not wrap around in the softmax, and truths are logits, too."""
    field = TensorField(name="x", dtype=dtype, shape=(2,))
    labelled = Signature(inputs=(field,), outputs=(field.model_copy(update={"name": "y"}),), labels=("a", "b"))
    rows = torch.tensor([[0, 1], [1, 0]]).to(field.torch_dtype)
    put(store, Same(), rows, labelled)
    with serving(store) as served:
        predictions = served.predict(rows.tolist()).json()["predictions"]
        assert [prediction["label"] for prediction in predictions] == ["b", "a"]
        assert [prediction["score"] for prediction in predictions] == pytest.approx([0.7310586] * 2, rel=1e-4)


# -- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"Content-Type": "text/plain"}, id="text"),
        pytest.param({"Content-Type": "application/x-www-form-urlencoded"}, id="a form"),
        pytest.param({"Content-Type": "application/jsonx"}, id="nearly JSON"),
        pytest.param({"Content-Type": "application/json", "Content-Encoding": "gzip"}, id="compressed"),
    ],
)
def test_other_content_is_refused(linear: Served, headers: dict[str, str]) -> None:
    """415 says what is taken and what came."""
    answer = linear.client.post("/predict", content=b"{}", headers=headers)
    detail = assert_refused(answer, 415, "unsupported_media_type")
    assert "expected plain application/json" in detail
    assert all(value in detail for value in headers.values())


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        pytest.param(b"", 400, "invalid_json", id="nothing"),
        pytest.param(b"{", 400, "invalid_json", id="half an object"),
        pytest.param(b"\xff", 400, "invalid_json", id="no UTF-8"),
        pytest.param(b"[" * 10_000, 400, "invalid_json", id="thousands of brackets"),
        pytest.param(b"[]", 422, "invalid_inputs", id="no object"),
        pytest.param(b'{"inputs": {"x": [[1, 2, 3]]}}', 422, "invalid_inputs", id="another name"),
        pytest.param(b'{"inputs": []}', 422, "wrong_shape", id="no rows"),
        pytest.param(b'{"inputs": [[1, 2]]}', 422, "wrong_shape", id="too short a row"),
        pytest.param(b'{"inputs": [[1, 2, "3"]]}', 422, "wrong_dtype", id="text"),
        pytest.param(b'{"inputs": [[1, 2, null]]}', 422, "wrong_dtype", id="null"),
        pytest.param(b'{"inputs": [[1, 2, 1e39]]}', 422, "not_finite", id="too large a number"),
        pytest.param(b'{"inputs": [%s]}' % b",".join([b"[1,2,3]"] * 9), 413, "too_many_rows", id="too many rows"),
        pytest.param(b" " * 20_001, 413, "body_too_large", id="too large a body"),
    ],
)
def test_each_refusal_has_its_status(linear: Served, body: bytes, status: int, code: str) -> None:
    """What is wrong with a body decides the status and the code."""
    answer = linear.client.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert_refused(answer, status, code)


def test_a_length_beyond_the_limit_is_refused_before_the_body_comes(linear: Served) -> None:
    """A client that announces too much is told at once, with both figures."""
    with connect(linear) as connection:
        connection.sendall(head("Content-Length: 999999999999"))
        response, body = receive(connection)
    assert response.status == 413
    assert body == {"error": "body_too_large", "detail": "expected at most 20000 bytes, got 999999999999"}


@pytest.mark.parametrize("pieces", [1, 2, 100], ids=["one piece", "two pieces", "a hundred pieces"])
@pytest.mark.parametrize("excess_bytes", [1, 10_000_000], ids=["one byte", "megabytes"])
def test_a_stream_beyond_the_limit_is_refused(linear: Served, pieces: int, excess_bytes: int) -> None:
    """A body whose length was not said is held to the limit all the same, however it is cut."""
    body = b'{"inputs": [[1, 2, 3]]}'.ljust(20_000 + excess_bytes)
    size = -(-len(body) // pieces)
    stream = (body[index : index + size] for index in range(0, len(body), size))
    answer = linear.client.post("/predict", content=stream, headers={"Content-Type": "application/json"})
    assert_refused(answer, 413, "body_too_large")


def test_a_body_as_large_as_allowed_is_taken(linear: Served) -> None:
    """The limit itself is allowed."""
    body = b'{"inputs": [[1, 2, 3]]}'.ljust(20_000)
    answer = linear.client.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200


@pytest.mark.parametrize("wanted", ["0", "1", "00001"])
def test_a_version_that_is_new_enough_answers(linear: Served, wanted: str) -> None:
    """With X-Min-Model-Version at or below the live version the request is answered."""
    assert linear.predict(GOOD, **{"X-Min-Model-Version": wanted}).status_code == 200


def test_a_version_that_is_too_old_refuses(linear: Served) -> None:
    """With X-Min-Model-Version above the live version the answer is 412, and names the live one."""
    answer = linear.predict(GOOD, **{"X-Min-Model-Version": "2"})
    detail = assert_refused(answer, 412, "version_too_old")
    assert "version 2 or later" in detail
    assert answer.json()["reason"] == "behind"
    assert answer.headers["X-Model-Version"] == "1"
    assert answer.headers["X-Model-Digest"] == linear.predict(GOOD).headers["X-Model-Digest"]


@pytest.mark.parametrize(
    "wanted", ["", "-1", "+1", "1.0", "latest", "0x1", "1 2", "9" * 16, "9" * 5000, "\u00b2", "\u0661"]
)
def test_rubbish_for_a_version_is_refused(linear: Served, wanted: str) -> None:
    """X-Min-Model-Version must be a number that a version can have."""
    answer = linear.client.post("/predict", json={"inputs": GOOD}, headers={b"X-Min-Model-Version": wanted.encode()})
    assert_refused(answer, 400, "invalid_header")


def test_before_the_first_version_there_is_no_answer_yet(served: Served) -> None:
    """503 with Retry-After, and why, until a version is live."""
    answer = served.predict(GOOD)
    assert "no version is live yet" in assert_refused(answer, 503, "no_live_version")
    assert int(answer.headers["Retry-After"]) >= 1


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        pytest.param("GET", "/predict", 405, "method_not_allowed", id="GET of /predict"),
        pytest.param("PUT", "/predict", 405, "method_not_allowed", id="PUT of /predict"),
        pytest.param("DELETE", "/model/version", 405, "method_not_allowed", id="DELETE of /model/version"),
        pytest.param("GET", "/nothing", 404, "not_found", id="a path that is not there"),
        pytest.param("POST", "/predict/more", 404, "not_found", id="a path below /predict"),
        pytest.param("GET", "/model/%ff%00", 404, "not_found", id="a path of odd bytes"),
    ],
)
def test_paths_and_methods_that_are_not_there(linear: Served, method: str, path: str, status: int, code: str) -> None:
    """404 and 405 have the shape that all refusals have, and 405 says which methods there are."""
    answer = linear.client.request(method, path)
    assert_refused(answer, status, code)
    assert status != 405 or answer.headers["Allow"]


def test_answers_are_counted_by_status(linear: Served) -> None:
    """Each answer of /predict shows in the metrics under its status."""
    linear.predict(GOOD)
    linear.predict([])
    good = linear.metric('emaswap_requests_total{status="200"}')
    bad = linear.metric('emaswap_requests_total{status="422"}')
    timed = linear.metric("emaswap_request_seconds_count")
    linear.predict(GOOD)
    linear.predict([])
    assert linear.metric('emaswap_requests_total{status="200"}') == good + 1
    assert linear.metric('emaswap_requests_total{status="422"}') == bad + 1
    assert linear.metric("emaswap_request_seconds_count") == timed + 2


# -- slow and vanishing clients -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service that waits a fifth of a second for a body."""
    store = DirectoryStore(tmp_path_factory.mktemp("impatient"))
    put(store, Linear(), ROWS)
    with serving(store, body_timeout_s=0.2) as served:
        yield served


@pytest.mark.parametrize("part", [b"", b'{"inputs": [[1,'], ids=["nothing", "a part"])
def test_a_body_that_never_ends_is_given_up(impatient: Served, part: bytes) -> None:
    """A client that stops sending is answered 408, and the service goes on."""
    with connect(impatient) as connection:
        connection.sendall(head("Content-Length: 100") + part)
        response, body = receive(connection)
    assert response.status == 408
    assert body["error"] == "body_timeout"
    assert_healthy(impatient)


def test_a_body_that_drips_is_given_up(impatient: Served) -> None:
    """Sending a byte now and then does not make the time longer that a client may take."""
    with connect(impatient) as connection:
        connection.sendall(head("Content-Length: 1000"))
        connection.settimeout(0.05)
        answer = b""
        for _ in range(40):
            connection.sendall(b" ")
            try:
                answer = connection.recv(1000)
                break
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_client_that_leaves_within_its_body_leaves_no_trace(linear: Served) -> None:
    """Connections that end in the middle of a request cost nothing that the next one would miss."""
    for _ in range(20):
        with connect(linear) as connection:
            connection.sendall(head("Content-Length: 1000") + b'{"inputs"')
    assert_healthy(linear)
    assert linear.metric("emaswap_waiting_requests") == 0


# -- the batch ----------------------------------------------------------------------------------------------------------


def token_request(ids: list[int], bias: float = 0.5) -> dict[str, Any]:
    """One row for `Tokens`."""
    return {"tokens": [ids], "bias": [bias]}


def wait_for_waiting(served: Served, requests: int) -> None:
    """Return once as many requests wait for the model."""
    wait_for(lambda: served.metric("emaswap_waiting_requests") == requests, what=f"{requests} waiting requests")


@contextmanager
def behind_another(served: Served, submit: Submit, requests: list[dict[str, Any]]) -> Iterator[list[httpx.Response]]:
    """Answers (complete after the block) to requests that all waited while another one ran."""
    answers: list[httpx.Response] = []
    with gate.closed():
        first = submit(served.predict, token_request([0]))
        gate.wait_until_reached()
        futures = []
        for number, request in enumerate(requests, start=1):
            futures.append(submit(served.predict, request))
            wait_for_waiting(served, number)
        gate.open()
        assert first.result(30).status_code == 200
        answers.extend(future.result(30) for future in futures)
        yield answers


def test_requests_that_wait_run_in_one_batch(tokens: Served, submit: Submit) -> None:
    """What arrived while a batch ran is the next batch, all of it at once, and each answer is its own request's."""
    batches, rows = tokens.metric("emaswap_batch_rows_count"), tokens.metric("emaswap_batch_rows_sum")
    requests = [token_request([index, index], bias=index) for index in range(6)]
    with behind_another(tokens, submit, requests) as answers:
        assert tokens.metric("emaswap_batch_rows_count") == batches + 2
        assert tokens.metric("emaswap_batch_rows_sum") == rows + 7
        for request, answer in zip(requests, answers, strict=True):
            expected = live_module(tokens)(torch.tensor(request["tokens"]), torch.tensor(request["bias"]))
            torch.testing.assert_close(torch.tensor(answer.json()["outputs"]["logits"]), expected["logits"])


def test_rows_of_different_sizes_never_share_a_batch(tokens: Served, submit: Submit) -> None:
    """Requests of rows of different sizes arrive together, run one size at a time, and are each answered right."""
    batches = tokens.metric("emaswap_batch_rows_count")
    requests = [token_request(list(range(size))) for size in (1, 2, 3, 1, 2, 3, 5)]
    with behind_another(tokens, submit, requests) as answers:
        assert tokens.metric("emaswap_batch_rows_count") == batches + 1 + 4
        for request, answer in zip(requests, answers, strict=True):
            assert answer.status_code == 200, answer.text
            expected = live_module(tokens)(torch.tensor(request["tokens"]), torch.tensor(request["bias"]))
            torch.testing.assert_close(torch.tensor(answer.json()["outputs"]["logits"]), expected["logits"])


def test_one_request_that_the_model_refuses_does_not_fail_its_neighbours(tokens: Served, submit: Submit) -> None:
    """A token id that the vocabulary has not is 422 for who sent it; the others in the batch get their answers."""
    requests = [token_request([1, 2]), token_request([3, 10]), token_request([5, 6]), token_request([-1, 0])]
    with behind_another(tokens, submit, requests) as answers:
        assert [answer.status_code for answer in answers] == [200, 422, 200, 422]
        assert "the model cannot take these inputs" in assert_refused(answers[1], 422, "model_refused")
        expected = live_module(tokens)(torch.tensor([[5, 6]]), torch.tensor([0.5]))
        torch.testing.assert_close(torch.tensor(answers[2].json()["outputs"]["logits"]), expected["logits"])


def test_many_clients_at_once_each_get_their_own_answer(linear: Served, submit: Submit) -> None:
    """Sixteen clients at once, each with rows of its own, never see another's."""

    def ask(client: int) -> None:
        with httpx.Client(base_url=linear.url, timeout=30) as connection:
            for index in range(20):
                row = [float(client), float(index), 1.0]
                answer = connection.post("/predict", json={"inputs": [row] * (1 + index % 3)})
                torch.testing.assert_close(
                    torch.tensor(answer.json()["outputs"]), live_module(linear)(torch.tensor([row] * (1 + index % 3)))
                )

    for future in [submit(ask, client) for client in range(16)]:
        future.result(30)


def test_a_batch_has_no_more_rows_than_allowed(store: DirectoryStore, submit: Submit) -> None:
    """Requests that would make a batch too large wait for the next one, in the order in which they came."""
    put(store, Gated(), ROWS)
    with serving(store, max_batch_rows=4) as served, gate.closed():
        first = submit(served.predict, GOOD)
        gate.wait_until_reached()
        futures = []
        for number in range(1, 4):
            futures.append(submit(served.predict, GOOD * 3))
            wait_for_waiting(served, number)
        gate.open()
        assert all(future.result(30).status_code == 200 for future in [first, *futures])
        assert served.metric("emaswap_batch_rows_count") == 4
        assert served.metric('emaswap_batch_rows_bucket{le="4.0"}') == 4


def test_a_full_queue_refuses(store: DirectoryStore, submit: Submit) -> None:
    """When as many wait as may, the next is told to try again; those that wait are answered."""
    put(store, Gated(), ROWS)
    with serving(store, max_waiting=1) as served, gate.closed():
        running = submit(served.predict, GOOD)
        gate.wait_until_reached()
        waiting = submit(served.predict, GOOD)
        wait_for_waiting(served, 1)
        refused = served.predict(GOOD)
        assert_refused(refused, 429, "queue_is_full")
        assert int(refused.headers["Retry-After"]) >= 1
        assert served.client.get("/healthz").status_code == 200
        gate.open()
        assert running.result(30).status_code == 200
        assert waiting.result(30).status_code == 200
        assert_healthy(served)


def test_a_client_that_leaves_while_it_waits_is_not_computed_for(store: DirectoryStore, submit: Submit) -> None:
    """Requests whose clients have gone free their places, are not run, and do not stop the others, nor the next."""
    put(store, Gated(), ROWS)
    body = json.dumps({"inputs": GOOD}).encode()
    with serving(store, max_waiting=1) as served, gate.closed():
        with connect(served) as connection:
            connection.sendall(head(f"Content-Length: {len(body)}") + body)
            gate.wait_until_reached()
            with connect(served) as another:
                another.sendall(head(f"Content-Length: {len(body)}") + body)
                wait_for_waiting(served, 1)
            wait_for_waiting(served, 0)
            staying = submit(served.predict, GOOD)
            wait_for_waiting(served, 1)
        gate.open()
        assert staying.result(30).status_code == 200
        assert served.metric("emaswap_batch_rows_sum") == 2
        assert_healthy(served)


# -- another signature --------------------------------------------------------------------------------------------------


def test_a_new_signature_is_followed(store: DirectoryStore) -> None:
    """When a version of another shape goes live, requests of the new shape are answered and those of the old refused."""
    put(store, Linear(), ROWS)
    with serving(store, poll_s=0.05) as served:
        assert_healthy(served)
        second = put(store, Linear(inputs=4, outputs=1), torch.ones(2, 4), inputs=4, outputs=1)
        served.wait_until_live(second.version)
        answer = served.predict([[1, 2, 3, 4]])
        assert answer.status_code == 200
        assert answer.headers["X-Model-Version"] == "2"
        assert len(answer.json()["outputs"][0]) == 1
        assert "shape (4), got shape (3,)" in assert_refused(served.predict(GOOD), 422, "wrong_shape")


def test_a_request_that_waited_through_a_change_of_signature_is_looked_at_anew(
    store: DirectoryStore, submit: Submit
) -> None:
    """What fitted the version before is answered by the version after if it fits that, too, and refused if it does not."""
    any_size = Signature(inputs=(TensorField(name="x", shape=(3,)),), outputs=(TensorField(name="y", shape=(None,)),))
    put(store, Gated(), ROWS)
    with serving(store, poll_s=0.05) as served:
        with gate.closed():
            running = submit(served.predict, GOOD)
            gate.wait_until_reached()
            fits_no_more = submit(served.predict, {"input": GOOD})
            fits_still = submit(served.predict, GOOD)
            wait_for_waiting(served, 2)
            put(store, Linear(), ROWS, any_size)
            served.wait_until_live(2)
            gate.open()
            assert running.result(30).headers["X-Model-Version"] == "1"
            answer = fits_still.result(30)
            assert answer.status_code == 200
            assert answer.headers["X-Model-Version"] == "2"
            assert_refused(fits_no_more.result(30), 422, "invalid_inputs")


# -- anything at all ----------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["input", "a", ""]), inner, max_size=3),
    max_leaves=12,
)
bodies = st.one_of(
    st.binary(max_size=100),
    json_values.map(lambda value: json.dumps(value).encode()),
    json_values.map(lambda value: json.dumps({"inputs": value}).encode()),
    st.lists(st.lists(st.floats() | json_values, min_size=3, max_size=3), max_size=10).map(
        lambda rows: json.dumps({"inputs": rows}).encode()
    ),
)
header_names = st.sampled_from(
    [
        "Accept",
        "Authorization",
        "Connection",
        "Content-Encoding",
        "Content-Length",
        "Content-Type",
        "Cookie",
        "Expect",
        "Host",
        "Transfer-Encoding",
        "Upgrade",
        "X-Min-Model-Version",
    ]
)
header_values = st.one_of(
    st.sampled_from(["1", "0", "-1", "chunked", "gzip", "100-continue", "close", "upgrade", "websocket", "application/json"]),
    st.text(st.characters(min_codepoint=1, max_codepoint=255, exclude_characters="\r\n"), max_size=20),
    st.text(st.characters(max_codepoint=255), max_size=20),
)  # fmt: skip


def status_of(served: Served, request: bytes) -> int | None:
    """The status of the answer to some bytes; `None` when the connection ends without one."""
    with connect(served) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        try:
            answer = connection.recv(1000)
        except ConnectionError:
            return None
    return int(answer.split()[1]) if answer else None


def test_a_fault_of_ours_is_counted(linear: Served) -> None:
    """What no client can cause shows as status 500 in the metrics, where the alert on errors finds it."""

    async def receive() -> MutableMapping[str, Any]:
        raise RuntimeError("the server's own fault")

    async def send(_: MutableMapping[str, Any]) -> None:
        raise AssertionError("nothing is to be answered from here")

    with pytest.raises(RuntimeError, match="own fault"):
        asyncio.run(
            Endpoint(linear.app.state.predict)({"type": "http", "raw_path": b"/predict", "headers": []}, receive, send)
        )
    assert linear.metric('emaswap_requests_total{status="500"}') == 1


def test_memory_that_runs_out_while_parsing_is_our_fault(linear: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 with Retry-After, not 500; the next request is answered."""

    def parse(*_: object) -> Rows:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("service.web.predict.parse_together", parse)
        patch.setattr("service.web.json_rows.parse", parse)
        answer = linear.predict(GOOD)
    assert_refused(answer, 503, "out_of_memory")
    assert answer.headers["Retry-After"]
    assert_healthy(linear)


@given(bodies)
@settings(deadline=None)
def test_any_body_is_answered_or_refused(linear: Served, body: bytes) -> None:
    """Whatever the body is, the answer is 200 or a refusal of the one shape, on a connection that can be used again."""
    answer = linear.client.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200 or answer.json().keys() == {"error", "detail"}
    assert answer.status_code < 500
    assert_healthy(linear)


@given(st.lists(st.tuples(header_names, header_values), max_size=4), st.sampled_from([b"", b'{"inputs": [[1, 2, 3]]}']))
@settings(deadline=None)
def test_any_headers_are_answered_or_refused(linear: Served, headers: list[tuple[str, str]], body: bytes) -> None:
    """Whatever the headers are, the answer is no error of the server's, and the next good request is answered."""
    lines = [f"{name}: {value}" for name, value in headers]
    status = status_of(linear, head(f"Content-Length: {len(body)}", *lines) + body)
    assert status is None or status < 500
    assert_healthy(linear)


@given(st.binary(max_size=200), st.sampled_from(["", "POST /predict HTTP/1.1\r\n", "GET /model/"]))
@settings(deadline=None)
def test_any_bytes_are_answered_or_refused(linear: Served, rubbish: bytes, start: str) -> None:
    """Whatever comes on a connection, HTTP or not, the next good request is answered."""
    status = status_of(linear, start.encode() + rubbish)
    assert status is None or status < 500
    assert_healthy(linear)
