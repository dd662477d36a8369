"""The Open Inference Protocol over HTTP, through both doors, request by request."""

import json
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from emaswap import DirectoryStore
from tests.models import EveryDtype, Linear
from tests.service.web.test_predict import ROWS, TOKENS, TOKENS_PROBE, live_module, put, serving
from tests.serving import Served, other_door
from tests.slow_models import GatedTokens

INFER = "/v2/models/test/infer"
INPUT = {"name": "input", "shape": [2, 3], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6]}


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service of a `Linear` of three inputs."""
    store = DirectoryStore(tmp_path_factory.mktemp("linear"))
    put(store, Linear(), ROWS)
    with serving(store, max_batch_rows=8) as served:
        yield served


@pytest.fixture(scope="module", params=["hot", "asgi"])
def linear(request: pytest.FixtureRequest, inside: Served) -> Iterator[Served]:
    """The service, behind each of its doors."""
    if request.param == "hot":
        yield inside
        return
    with other_door(inside) as other:
        yield other


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service of two inputs and two outputs."""
    store = DirectoryStore(tmp_path_factory.mktemp("tokens"))
    put(store, GatedTokens(), TOKENS_PROBE, TOKENS)
    with serving(store) as served:
        yield served


def infer(served: Served, *inputs: dict[str, Any], path: str = INFER, **more: Any) -> httpx.Response:
    """The answer to a request in JSON."""
    return served.client.post(path, json={"inputs": list(inputs), **more})


def expected(served: Served, rows: list[list[float]]) -> torch.Tensor:
    """What the live module answers."""
    outputs: torch.Tensor = live_module(served)(torch.tensor(rows, dtype=torch.float32))
    return outputs


def test_metadata_and_health(linear: Served) -> None:
    """What the protocol asks before the first request."""
    get = linear.client.get
    assert get("/v2").json()["name"] == "emaswap"
    assert "binary_tensor_data" in get("/v2").json()["extensions"]
    assert get("/v2/health/live").json() == {"live": True}
    assert get("/v2/health/ready").json() == {"ready": True}
    for path in ("/v2/models/test", "/v2/models/test/versions/1"):
        assert get(path).json() == {
            "name": "test",
            "versions": ["1"],
            "platform": "pytorch",
            "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 3]}],
            "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 2]}],
        }
        assert get(f"{path}/ready").json()["ready"]
    assert linear.client.post("/v2/repository/index").json() == [
        {"name": "test", "version": "1", "state": "READY", "reason": ""}
    ]
    assert linear.client.post("/v2/repository/index", json={"ready": True}).status_code == 200


@pytest.mark.parametrize("data", [[1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]], ids=["flat", "nested"])
@pytest.mark.parametrize("path", [INFER, "/v2/models/test/versions/1/infer"])
def test_json(linear: Served, data: list[Any], path: str) -> None:
    """Data may be flat or nested; the answer is flat, and says who made it."""
    answer = infer(linear, INPUT | {"data": data}, id="42", path=path)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["model_name"], body["model_version"], body["id"]) == ("test", "1", "42")
    assert body["parameters"]["digest"] == answer.headers["X-Model-Digest"]
    (output,) = body["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("output", "FP32", [2, 2])
    torch.testing.assert_close(
        torch.tensor(output["data"]).view(2, 2), expected(linear, [[1, 2, 3], [4, 5, 6]]), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("binary_output", [False, True])
def test_bytes(linear: Served, binary_output: bool) -> None:
    """Inputs may follow the JSON as bytes, and outputs come so where that is asked for."""
    raw = struct.pack("<6f", *range(6))
    described = {k: v for k, v in INPUT.items() if k != "data"} | {"parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [described], "parameters": {"binary_data_output": binary_output}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    answer = linear.client.post(INFER, content=head + raw, headers=headers)
    assert answer.status_code == 200, answer.text
    if binary_output:
        length = int(answer.headers["Inference-Header-Content-Length"])
        (output,) = json.loads(answer.content[:length])["outputs"]
        assert output["parameters"]["binary_data_size"] == len(answer.content) - length == 16
        values = np.frombuffer(answer.content[length:], "<f4")
    else:
        values = np.array(answer.json()["outputs"][0]["data"], np.float32)
    torch.testing.assert_close(
        torch.from_numpy(values.copy()).view(2, 2), expected(linear, [[0, 1, 2], [3, 4, 5]]), rtol=1e-6, atol=1e-6
    )


def test_several_inputs_and_outputs(tokens: Served) -> None:
    """Inputs come in any order; only the outputs that are asked for are sent."""
    bias = {"name": "bias", "shape": [1], "datatype": "FP32", "data": [0.5]}
    ids = {"name": "tokens", "shape": [1, 3], "datatype": "INT64", "data": [[1, 2, 3]]}
    every = infer(tokens, bias, ids).json()["outputs"]
    assert {output["name"] for output in every} == {"logits", "mean"}
    some = infer(tokens, bias, ids, outputs=[{"name": "mean"}]).json()["outputs"]
    assert some == [output for output in every if output["name"] == "mean"]


def test_every_dtype(store: DirectoryStore) -> None:
    """Each dtype that a signature can have is taken as JSON and as bytes, and sent back as it is."""
    names = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
    probe = {name: torch.ones(2, 2, dtype=getattr(torch, name)) for name in names}
    probe["boolean"] = torch.tensor([[True, False], [False, True]])
    put(store, EveryDtype(), probe)
    with serving(store) as served:
        metadata = served.client.get("/v2/models/test").json()
        assert {each["datatype"] for each in metadata["inputs"]} == {
            "BOOL", "UINT8", "INT8", "INT16", "INT32", "INT64", "FP16", "BF16", "FP32", "FP64"
        }  # fmt: skip
        as_json, as_bytes, raw = [], [], b""
        for each in metadata["inputs"]:
            value = probe[each["name"]]
            size = value.numel() * value.element_size()
            data = value.view(torch.int16 if each["datatype"] == "BF16" else value.dtype).numpy().tobytes()
            described = {"name": each["name"], "datatype": each["datatype"], "shape": [2, 2]}
            as_json.append(described | {"data": value.flatten().tolist()})
            as_bytes.append(described | {"parameters": {"binary_data_size": size}})
            raw += data
        answer = infer(served, *as_json)
        assert answer.status_code == 200, answer.text
        head = json.dumps({"inputs": as_bytes}).encode()
        other = served.client.post(
            INFER, content=head + raw, headers={"Inference-Header-Content-Length": str(len(head))}
        )
        assert other.json()["outputs"] == answer.json()["outputs"]


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        pytest.param({"datatype": "BYTES", "data": ["a"]}, 422, "wrong_dtype", id="BYTES"),
        pytest.param({"datatype": "FP64"}, 422, "wrong_dtype", id="another datatype"),
        pytest.param({"name": "x"}, 422, "invalid_inputs", id="another name"),
        pytest.param({"shape": [2, 4]}, 422, "wrong_shape", id="another shape"),
        pytest.param({"shape": [3]}, 422, "wrong_shape", id="no batch"),
        pytest.param({"shape": []}, 422, "wrong_shape", id="no dimension"),
        pytest.param({"shape": [0, 3], "data": []}, 422, "wrong_shape", id="no rows"),
        pytest.param({"shape": [-1, 3]}, 422, "invalid_inputs", id="a negative size"),
        pytest.param({"shape": [2.0, 3]}, 422, "invalid_inputs", id="a size that is no integer"),
        pytest.param({"shape": [1 << 48, 3]}, 413, "too_many_rows", id="very many rows"),
        pytest.param({"shape": [9, 3], "data": [0] * 27}, 413, "too_many_rows", id="a row too many"),
        pytest.param({"data": [1, 2, 3]}, 422, "wrong_shape", id="too few numbers"),
        pytest.param({"data": [[1, 2, 3]]}, 422, "wrong_shape", id="too few rows"),
        pytest.param({"data": [[1, 2], [3, 4, 5, 6]]}, 422, "wrong_shape", id="ragged"),
        pytest.param({"data": [1, 2, 3, 4, 5, "6"]}, 422, "wrong_dtype", id="text"),
        pytest.param({"data": [1, 2, 3, 4, 5, True]}, 422, "wrong_dtype", id="a truth value"),
        pytest.param({"data": [1, 2, 3, 4, 5, None]}, 422, "wrong_dtype", id="null"),
        pytest.param({"data": [1, 2, 3, 4, 5, 1e39]}, 422, "not_finite", id="too large"),
        pytest.param({"data": None}, 422, "invalid_inputs", id="no data"),
        pytest.param({"data": "abc"}, 422, "invalid_inputs", id="data that is no list"),
        pytest.param({"parameters": {"binary_data_size": 24}}, 422, "wrong_shape", id="bytes that do not follow"),
        pytest.param({"parameters": {"binary_data_size": -1}}, 422, "invalid_inputs", id="a negative number of bytes"),
    ],
)
def test_what_does_not_fit_is_refused(linear: Served, change: dict[str, Any], status: int, code: str) -> None:
    """In the protocol's form, whose one field that clients show has code and words."""
    answer = infer(linear, INPUT | change)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"].startswith(f"{code}: ")
    assert answer.json()["detail"]


@pytest.mark.parametrize(
    ("more", "status", "code"),
    [
        ({"outputs": [{"name": "x"}]}, 422, "invalid_inputs"),
        ({"outputs": [{"name": "output", "parameters": {"classification": 3}}]}, 422, "invalid_inputs"),
        ({"outputs": "output"}, 422, "invalid_inputs"),
        ({"id": 7}, 422, "invalid_inputs"),
    ],
)
def test_what_cannot_be_answered_is_refused(linear: Served, more: dict[str, Any], status: int, code: str) -> None:
    """Outputs that there are not, and options that are none."""
    answer = infer(linear, INPUT, **more)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"].startswith(f"{code}: ")


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v2/models/other/infer", "unknown_model"),
        ("/v2/models/test/versions/2/infer", "unknown_version"),
        ("/v2/models/test/versions/x/infer", "unknown_version"),
        ("/v2/models/test/versiens/1/infer", "not_found"),
        ("/v2/models/a/b/c/infer", "not_found"),
    ],
)
def test_other_models_and_versions_are_not_found(linear: Served, path: str, code: str) -> None:
    """404 says what is there instead."""
    answer = infer(linear, INPUT, path=path)
    assert answer.status_code == 404, answer.text
    assert answer.json()["error"].startswith(code)


@pytest.mark.parametrize("length", ["x", "-1", "0" * 30, "100000"])
def test_a_length_that_is_none_is_refused(linear: Served, length: str) -> None:
    """The length of the JSON must be a number, and not more than there is."""
    answer = linear.client.post(
        INFER, content=json.dumps({"inputs": [INPUT]}), headers={"Inference-Header-Content-Length": length}
    )
    assert answer.status_code == 400
