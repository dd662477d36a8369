"""Rows as bytes: bare numbers and numpy's format, in and out."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from emaswap import DirectoryStore
from tests.models import Linear
from tests.service.web.test_predict import ROWS, TOKENS, TOKENS_PROBE, assert_refused, live_module, put, serving
from tests.serving import Served
from tests.slow_models import GatedTokens

BARE, NPY, JSON = "application/octet-stream", "application/x-numpy", "application/json"
VALUES = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service of a `Linear` of three inputs."""
    store = DirectoryStore(tmp_path_factory.mktemp("linear"))
    put(store, Linear(), ROWS)
    with serving(store, max_batch_rows=8) as served:
        yield served


def npy(array: NDArray[Any]) -> bytes:
    """An array as numpy saves it."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("accept", [BARE, NPY, JSON, "*/*", f"{NPY}, {JSON};q=0.5", "text/html"])
@pytest.mark.parametrize("kind", [BARE, NPY, JSON])
def test_every_kind_is_taken_and_given(linear: Served, kind: str, accept: str) -> None:
    """The answer's kind is what `Accept` names first; it is always the same numbers, and says which version made them."""
    content = {BARE: VALUES.tobytes(), NPY: npy(VALUES), JSON: b'{"inputs": %b}' % str(VALUES.tolist()).encode()}[kind]
    answer = linear.client.post("/predict", content=content, headers={"Content-Type": kind, "Accept": accept})
    assert answer.status_code == 200, answer.text
    given = answer.headers["Content-Type"]
    assert given == (accept.split(",", maxsplit=1)[0] if accept.split(",", maxsplit=1)[0] in (BARE, NPY) else JSON)
    if given == BARE:
        values = np.frombuffer(answer.content, "<f4").reshape(2, 2)
    elif given == NPY:
        values = np.load(io.BytesIO(answer.content))
    else:
        values = np.array(answer.json()["outputs"], np.float32)
    torch.testing.assert_close(
        torch.from_numpy(values.copy()), live_module(linear)(torch.from_numpy(VALUES)), rtol=1e-6, atol=1e-6
    )
    assert answer.headers["X-Model-Version"] == "1"


@pytest.mark.parametrize(
    "array",
    [VALUES.astype(">f4"), VALUES.astype(np.float64), np.asfortranarray(VALUES), np.ones((2, 3), np.int64)],
    ids=["big-endian", "float64", "by columns", "integers"],
)
def test_arrays_are_converted(linear: Served, array: NDArray[Any]) -> None:
    """What numpy saves otherwise, and the signature's dtype can hold, is taken for what it is."""
    answer = linear.client.post("/predict", content=npy(array), headers={"Content-Type": NPY})
    torch.testing.assert_close(
        torch.tensor(answer.json()["outputs"]),
        live_module(linear)(torch.from_numpy(array.astype(np.float32))),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("kind", "content", "status", "code"),
    [
        pytest.param(BARE, b"", 422, "wrong_shape", id="no rows"),
        pytest.param(BARE, b"x" * 13, 422, "wrong_shape", id="a part of a row"),
        pytest.param(BARE, b"\0" * 12 * 9, 413, "too_many_rows", id="too many rows"),
        pytest.param(BARE, np.full((1, 3), np.nan, "<f4").tobytes(), 422, "not_finite", id="NaN"),
        pytest.param(NPY, npy(np.full((1, 3), np.inf, "<f4")), 422, "not_finite", id="infinity"),
        pytest.param(NPY, npy(np.full((1, 3), 1e300)), 422, "not_finite", id="too large"),
        pytest.param(NPY, b"", 422, "invalid_inputs", id="nothing"),
        pytest.param(NPY, b"\x93NUMPY\x01\x00", 422, "invalid_inputs", id="no header"),
        pytest.param(NPY, npy(VALUES)[:-1], 422, "wrong_shape", id="cut off"),
        pytest.param(NPY, npy(VALUES) + b"x", 422, "wrong_shape", id="more behind it"),
        pytest.param(NPY, npy(VALUES).replace(b"(2, 3)", b"(9**99,)")[:200], 422, "invalid_inputs", id="a power"),
        pytest.param(NPY, npy(VALUES).replace(b"(2, 3), }", b"(999999999999, 3), }"), 422, "wrong_shape", id="huge"),
        pytest.param(NPY, npy(np.array([["a"]])), 422, "wrong_dtype", id="text"),
        pytest.param(NPY, npy(np.array([[True] * 3])), 422, "wrong_dtype", id="truth values"),
        pytest.param(NPY, npy(np.array(1, np.float32)), 422, "wrong_shape", id="no dimension"),
        pytest.param(NPY, npy(np.ones((2, 4), np.float32)), 422, "wrong_shape", id="another shape"),
        pytest.param(NPY, npy(np.ones((9, 3), np.float32)), 413, "too_many_rows", id="a row too many"),
    ],
)
def test_what_does_not_fit_is_refused(linear: Served, kind: str, content: bytes, status: int, code: str) -> None:
    """With what was expected and what came; the next good request is answered."""
    assert_refused(linear.client.post("/predict", content=content, headers={"Content-Type": kind}), status, code)
    assert linear.predict([[1, 2, 3]]).status_code == 200


def test_pickles_are_never_read(linear: Served) -> None:
    """An array of objects would be a pickle."""
    file = io.BytesIO()
    np.save(file, np.array([[{"a": 1}]], dtype=object), allow_pickle=True)
    answer = linear.client.post("/predict", content=file.getvalue(), headers={"Content-Type": NPY})
    assert_refused(answer, 422, "wrong_dtype")


def test_a_request_that_cannot_be_answered_so_does_not_fail_its_neighbours(store: DirectoryStore) -> None:
    """Several outputs have no bare form: 406, for who asked for it alone. Several inputs have none, either: 415."""
    put(store, GatedTokens(), TOKENS_PROBE, TOKENS)
    request = {"inputs": {"tokens": [[1, 2]], "bias": [0.5]}}
    with serving(store) as served:
        assert_refused(served.client.post("/predict", json=request, headers={"Accept": BARE}), 406, "not_acceptable")
        assert served.client.post("/predict", json=request).status_code == 200
        answer = served.client.post("/predict", content=b"12345678", headers={"Content-Type": BARE})
        assert_refused(answer, 415, "unsupported_media_type")
