"""The Open Inference Protocol (KServe's and Triton's REST, version 2) with its binary tensor extension.

The live version is the one there is: a request may name it, and gets a 404 when it names another.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self
from urllib.parse import unquote_to_bytes

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emaswap import Signature, TensorField
from service.refusal import Code, Refusal
from service.serving.servable import Rows, Servable, Served
from service.web import refused
from service.web.binary_rows import from_bytes, little_endian
from service.web.dialect import Dialect, Parsed
from service.web.json_rows import check_counts, to_array

DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float32": "FP32",
    "float64": "FP64",
}
"""The protocol's name of each dtype that a signature can have."""

_LENGTH = b"inference-header-content-length"
_MAX_DIGITS = 15


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class _Parameters(_Part):
    binary_data_size: Annotated[int, Field(ge=0)] | None = None
    binary_data: bool | None = None
    classification: int | None = None


class _Input(_Part):
    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, le=1 << 48)]], Field(max_length=33)]
    datatype: str
    data: list[Any] | None = None
    parameters: _Parameters = _Parameters()


class _Output(_Part):
    name: str
    parameters: _Parameters = _Parameters()


class _Options(_Part):
    binary_data_output: bool = False


class InferRequest(_Part):
    """A request of the protocol. What it has besides is ignored."""

    inputs: Annotated[list[_Input], Field(min_length=1)]
    outputs: list[_Output] = []
    id: str | None = None
    parameters: _Options = _Options()


@dataclass(frozen=True)
class _Asked:
    """What a request asks of its answer: which outputs, which of them as bytes, and under what id."""

    names: tuple[str, ...]
    as_bytes: frozenset[str]
    id: str | None


def is_infer(path: bytes) -> bool:
    """Return whether a path is one that the protocol asks for inference at."""
    return path.startswith(b"/v2/models/") and path.endswith(b"/infer") and path.count(b"/") in (4, 6)


@dataclass(frozen=True)
class OpenInference(Dialect):
    """Requests of the protocol for one model, and where they say so one version; `header` bytes of them are JSON."""

    model: str
    version: str | None = None
    header: int | None = None

    @classmethod
    def of(cls, path: bytes, headers: Mapping[bytes, bytes]) -> Self:
        """Return the dialect of a request. Raises `Refusal` for a path or a length that is none."""
        parts = [unquote_to_bytes(part).decode("utf-8", "backslashreplace") for part in path.split(b"/")[3:-1]]
        if len(parts) == 3 and parts[1] != "versions":
            raise Refusal(Code.NOT_FOUND, "expected /v2/models/MODEL/infer or /v2/models/MODEL/versions/VERSION/infer")
        text = headers.get(_LENGTH)
        if text is not None and (not text.isdigit() or len(text) > _MAX_DIGITS):
            raise Refusal(Code.INVALID_HEADER, f"Inference-Header-Content-Length: expected a number, got {text[:40]!r}")
        return cls(parts[0], parts[2] if len(parts) == 3 else None, None if text is None else int(text))

    def parse(self, body: bytes, servable: Servable, max_rows: int) -> Parsed:
        """Return the inputs of a body: JSON, and behind it the bytes of those that are not in it."""
        check_named(servable, self.model, self.version)
        end = len(body) if self.header is None else self.header
        if end > len(body):
            raise Refusal(Code.INVALID_JSON, f"expected {end} bytes of JSON, got a body of {len(body)}")
        request = _read(body[:end])
        signature = servable.signature
        given = {each.name: each for each in request.inputs}
        wanted = [field.name for field in signature.inputs]
        if len(given) != len(request.inputs) or given.keys() != set(wanted):
            raise Refusal(
                Code.INVALID_INPUTS,
                f"expected the inputs {wanted}, got {[each.name[:40] for each in request.inputs[:20]]}",
            )
        raw = _split(memoryview(body)[end:], request.inputs)
        for field in signature.inputs:
            _check(given[field.name], field)
        check_counts({name: each.shape[0] for name, each in given.items()}, max_rows)
        inputs = {field.name: _rows(given[field.name], field, raw.get(field.name)) for field in signature.inputs}
        return Parsed(inputs, _asked(request, signature))

    def encode(self, outputs: Rows, servable: Servable, asked: object) -> tuple[bytes, bytes]:
        """Return an answer of the protocol. Which version made it is also said in headers and parameters."""
        assert isinstance(asked, _Asked)
        described: list[dict[str, Any]] = []
        raw: list[bytes] = []
        for name in asked.names:
            output = outputs[name]
            entry: dict[str, Any] = {
                "name": name,
                "datatype": DATATYPES[output.dtype.name],
                "shape": list(output.shape),
            }
            if name in asked.as_bytes:
                raw.append(little_endian(output).tobytes())
                entry["parameters"] = {"binary_data_size": len(raw[-1])}
            else:
                entry["data"] = np.ascontiguousarray(output).reshape(-1)
            described.append(entry)
        answer = {
            "model_name": servable.manifest.model,
            "model_version": str(servable.version),
            **({} if asked.id is None else {"id": asked.id}),
            "parameters": {"digest": servable.digest, "step": servable.manifest.training.step},
            "outputs": described,
        }
        head = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        lines = refused.as_lines(refused.identity(servable))
        if raw:
            lines += b"content-type: application/octet-stream\r\n%b: %d\r\n" % (_LENGTH, len(head))
        else:
            lines += refused.PLAIN
        return lines, b"".join([head, *raw])

    def refuse(self, refusal: Refusal) -> bytes:
        """Return the body of a refusal."""
        return refused.body(refusal, in_words=True)


def check_named(servable: Served, model: str, version: str | None) -> None:
    """Raise `Refusal` unless a request means what is live."""
    if model != servable.manifest.model:
        raise Refusal(Code.UNKNOWN_MODEL, f"expected the model {servable.manifest.model!r}, got {model[:200]!r}")
    if version is not None and version != str(servable.version):
        raise Refusal(
            Code.UNKNOWN_VERSION,
            f"version {version[:40]!r} is not live, version {servable.version} is; leave the version out to get whichever is",
        )


def tensor_metadata(field: TensorField) -> dict[str, Any]:
    """Return what the protocol says of an input or an output. Its batch dimension comes first; -1 is a size that varies."""
    sizes = [-1 if size is None else size for size in field.shape]
    return {"name": field.name, "datatype": DATATYPES[field.dtype], "shape": [-1, *sizes]}


def _read(body: bytes) -> InferRequest:
    try:
        return InferRequest.model_validate(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise Refusal(Code.INVALID_JSON, f"the body is not JSON: {error}") from None
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:10]]
        raise Refusal(Code.INVALID_INPUTS, "; ".join(problems)) from None


def _split(raw: memoryview, inputs: Sequence[_Input]) -> dict[str, memoryview]:
    """Return the bytes of each input that says how many it has behind the JSON, in order."""
    parts: dict[str, memoryview] = {}
    first = 0
    for each in inputs:
        size = each.parameters.binary_data_size
        if size is not None:
            parts[each.name] = raw[first : first + size]
            first += size
    if first != len(raw):
        raise Refusal(Code.WRONG_SHAPE, f"the inputs say that {first} bytes follow the JSON, and {len(raw)} do")
    return parts


def _check(given: _Input, field: TensorField) -> None:
    """Raise `Refusal` unless an input says that it is what the field is."""
    datatype = DATATYPES[field.dtype]
    if given.datatype != datatype:
        raise Refusal(
            Code.WRONG_DTYPE, f"input {field.name!r}: expected the datatype {datatype}, got {given.datatype[:40]!r}"
        )
    if not given.shape or not given.shape[0] or not field.accepts(given.shape[1:]):
        raise Refusal(
            Code.WRONG_SHAPE,
            f"input {field.name!r}: expected at least one row, each {field}, got the shape {given.shape}, rows first",
        )


def _rows(given: _Input, field: TensorField, raw: memoryview | None) -> NDArray[np.generic]:
    """Return the rows of an input, from its bytes or its data, which may be nested or flat."""
    numbers = math.prod(given.shape)
    if raw is not None:
        size = numbers * {"bfloat16": 2, "bool": 1}.get(field.dtype, 0) or numbers * np.dtype(field.dtype).itemsize
        if given.data is not None or len(raw) != size:
            came = "data besides" if given.data is not None else f"{len(raw)} bytes"
            raise Refusal(
                Code.WRONG_SHAPE, f"input {field.name!r}: expected {size} bytes of shape {given.shape}, got {came}"
            )
        return from_bytes(raw, field, given.shape)
    if given.data is None:
        raise Refusal(
            Code.INVALID_INPUTS, f"input {field.name!r}: expected data, or binary_data_size in its parameters"
        )
    if given.data and isinstance(given.data[0], list):
        rows = to_array(given.data, field)
        if rows.shape != tuple(given.shape):
            raise Refusal(Code.WRONG_SHAPE, f"input {field.name!r}: expected the shape {given.shape}, got {rows.shape}")
        return rows
    if len(given.data) != numbers:
        raise Refusal(
            Code.WRONG_SHAPE,
            f"input {field.name!r}: expected {numbers} numbers for the shape {given.shape}, got {len(given.data)}",
        )
    flat = to_array(given.data, TensorField(name=field.name, dtype=field.dtype))
    return flat.reshape(given.shape)


def _asked(request: InferRequest, signature: Signature) -> _Asked:
    """Return what the request asks of its answer. Raises `Refusal` for an output that there is not."""
    names = [field.name for field in signature.outputs]
    wanted = {each.name: each.parameters for each in request.outputs} or dict.fromkeys(names, _Parameters())
    if unknown := [name[:40] for name in wanted if name not in names]:
        raise Refusal(Code.INVALID_INPUTS, f"expected some of the outputs {names}, got {unknown[:20]}")
    if any(each.classification for each in wanted.values()):
        raise Refusal(Code.INVALID_INPUTS, "classification is not offered: ask for the output itself")
    usual = request.parameters.binary_data_output
    as_bytes = {name for name, each in wanted.items() if (usual if each.binary_data is None else each.binary_data)}
    return _Asked(tuple(wanted), frozenset(as_bytes), request.id)
