"""Rows as JSON: from a request to arrays that fit the signature, and from outputs to an answer."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from emaswap import Signature, TensorField
from service.refusal import Code, Refusal
from service.serving.batcher import Answer
from service.serving.servable import Rows

# numpy has no bfloat16: such an input is parsed as float32 and narrowed by torch.
_NUMPY_DTYPES = {"bfloat16": np.dtype("float32")}

# What torch rounds to infinity: half a step above the largest bfloat16.
_BFLOAT16_END = float.fromhex("0x1.FFp127")


def parse(body: bytes, signature: Signature, max_rows: int) -> Rows:
    """Return the inputs that a request's body holds, by name and in the signature's order.

    Raises `Refusal`, which names the first row that does not fit, what was expected of it and what came.
    """
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal(Code.INVALID_JSON, f"the body is not JSON: {error}") from None
    if not isinstance(request, dict) or "inputs" not in request:
        raise Refusal(Code.INVALID_INPUTS, f'expected an object {{"inputs": [row, ...]}}, got {_kind(request)}')
    inputs, fields = request["inputs"], signature.inputs
    names = [field.name for field in fields]
    quotes = 2 + 2 * len(fields)
    if not isinstance(inputs, dict):
        if len(fields) > 1:
            raise Refusal(Code.INVALID_INPUTS, f"expected inputs by name: {names}, got {_kind(inputs)}")
        inputs, quotes = {names[0]: inputs}, 2
    if inputs.keys() != set(names):
        raise Refusal(Code.INVALID_INPUTS, f"expected the inputs {names}, got {_keys(inputs)}")

    counts = {name: _count(name, inputs[name]) for name in names}
    if len(set(counts.values())) > 1:
        raise Refusal(Code.WRONG_SHAPE, f"expected the same number of rows in each input, got {counts}")
    if (rows := counts[names[0]]) > max_rows:
        raise Refusal(
            Code.TOO_MANY_ROWS, f"expected at most {max_rows} rows in a request, got {rows}; send several requests"
        )

    # For text, numpy would allocate the longest text's length for every value; beside a number, it takes true for 1.
    # Both leave traces in the body, where they are quickly found.
    suspicious = body.count(b'"') > quotes or b"true" in body or b"false" in body
    return {field.name: _array(inputs[field.name], field, suspicious=suspicious) for field in fields}


def encode(answer: Answer) -> bytes:
    """Return the body of an answer: outputs, predictions where there are labels, and the version that made them.

    Raises `Refusal` when there are not as many outputs as labels.
    """
    servable, outputs = answer.servable, answer.outputs
    body: dict[str, Any] = {"outputs": outputs if len(outputs) > 1 else next(iter(outputs.values()))}
    if servable.signature.labels is not None:
        body["predictions"] = _predictions(next(iter(outputs.values())), servable.signature.labels)
    body["model"] = {
        "name": servable.manifest.model,
        "version": servable.version,
        "step": servable.manifest.training.step,
        "digest": servable.digest,
    }
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _predictions(logits: NDArray[Any], labels: tuple[str, ...]) -> list[dict[str, object]]:
    """Return the likeliest label of each row, and its softmax probability."""
    if logits.shape[1] != len(labels):
        raise Refusal(Code.MODEL_REFUSED, f"the model gave {logits.shape[1]} outputs a row for {len(labels)} labels")
    # Whole numbers would wrap around.
    logits = logits.astype(np.promote_types(logits.dtype, np.float32))
    best = logits.argmax(axis=1)
    with np.errstate(invalid="ignore"):
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = (shifted / shifted.sum(axis=1, keepdims=True))[np.arange(len(best)), best]
    return [{"label": labels[index], "score": score} for index, score in zip(best.tolist(), scores, strict=True)]


def _count(name: str, rows: Any) -> int:
    if not isinstance(rows, list) or not rows:
        raise Refusal(Code.WRONG_SHAPE, f"input {name!r}: expected a list of at least one row, got {_kind(rows)}")
    return len(rows)


def _array(rows: list[Any], field: TensorField, *, suspicious: bool) -> NDArray[np.generic]:
    if suspicious:
        for index, row in enumerate(rows):
            _refuse_strangers(row, index, field)
    try:
        array = np.asarray(rows)
    except (ValueError, OverflowError):  # ragged, or deeper than numpy goes
        raise _blame(rows, field) from None
    if array.dtype.kind in "bifu" and field.accepts(array.shape[1:]):
        cast = _cast(array, field)
        if cast is not None:
            return cast
    raise _blame(rows, field)


def _cast(array: NDArray[Any], field: TensorField) -> NDArray[np.generic] | None:
    """Return the array in the field's dtype, or `None` when a value is of another kind or out of range."""
    dtype = _numpy_dtype(field)
    if array.size == 0:
        return array.astype(dtype)
    if dtype.kind == "f":
        if array.dtype.kind == "b":
            return None
        with np.errstate(over="ignore"):
            cast = array.astype(dtype)
        finite = np.isfinite(cast)
        if field.dtype == "bfloat16":
            finite &= np.abs(cast) < _BFLOAT16_END
        if not finite.all():
            row = int(np.argwhere(~finite)[0][0])
            raise Refusal(Code.NOT_FINITE, f"input {field.name!r}, row {row}: a value is too large for {field.dtype}")
        return cast
    if array.dtype.kind not in ("b" if dtype.kind == "b" else "iu"):
        return None
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if array.min() < limits.min or array.max() > limits.max:
            return None
    return array.astype(dtype)


def _blame(rows: list[Any], field: TensorField) -> Refusal:
    """Return the refusal that names the first row which does not fit, once it is known that one does not."""
    first: tuple[int, ...] | None = None
    for index, row in enumerate(rows):
        _refuse_strangers(row, index, field)
        try:
            shape = np.asarray(row).shape
        except (ValueError, OverflowError):
            return Refusal(Code.WRONG_SHAPE, f"input {field.name!r}, row {index}: expected {field}, got a ragged list")
        if not field.accepts(shape):
            return Refusal(Code.WRONG_SHAPE, f"input {field.name!r}, row {index}: expected {field}, got shape {shape}")
        if first is not None and shape != first:
            return Refusal(
                Code.WRONG_SHAPE,
                f"input {field.name!r}, row {index}: expected the shape of the rows before it, {first}, got {shape}; "
                "send rows of different sizes in requests of their own",
            )
        first = shape
    return Refusal(Code.WRONG_DTYPE, f"input {field.name!r}: expected {field}, got values of mixed types")


def _refuse_strangers(row: Any, index: int, field: TensorField) -> None:
    """Raise `Refusal` for the first value in a row that the field's dtype cannot hold."""
    dtype = _numpy_dtype(field)
    limits = np.iinfo(dtype) if dtype.kind in "iu" else None
    kinds = (bool,) if dtype.kind == "b" else (int,) if limits else (int, float)
    left = [row]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left.extend(reversed(value))
        elif not isinstance(value, kinds) or (isinstance(value, bool) and dtype.kind != "b"):
            raise _wrong_dtype(field, index, _kind(value))
        elif limits and not limits.min <= value <= limits.max:
            raise _wrong_dtype(field, index, f"a number outside {limits.min}..{limits.max}")


def _wrong_dtype(field: TensorField, row: int, came: str) -> Refusal:
    return Refusal(Code.WRONG_DTYPE, f"input {field.name!r}, row {row}: expected {field}, got {came}")


def _numpy_dtype(field: TensorField) -> np.dtype[Any]:
    return _NUMPY_DTYPES.get(field.dtype) or np.dtype(field.dtype)


def _kind(value: Any) -> str:
    """Describe a JSON value in JSON's words, in few of them whatever its size."""
    if isinstance(value, Mapping):
        return f"an object with the keys {_keys(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"the number {value}"


def _keys(value: Mapping[str, Any]) -> list[str]:
    return [key[:40] for key in sorted(value)[:20]]
