"""From a request's JSON to arrays that fit a signature, or a refusal that says which row does not, and why."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from emaswap import Signature, TensorField
from service.errors import Refusal
from service.servable import Rows

# numpy has no bfloat16: such an input is parsed as float32 and narrowed by torch.
_NUMPY_DTYPES = {"bfloat16": np.dtype("float32")}


def parse(body: bytes, signature: Signature, max_rows: int) -> Rows:
    """The inputs of a request body, by name and in the signature's order. Raises `Refusal`."""
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal("invalid_json", f"the body is not JSON: {error}") from None
    if not isinstance(request, dict) or "inputs" not in request:
        raise Refusal("invalid_inputs", f'expected an object {{"inputs": [row, ...]}}, got {_kind(request)}')
    inputs = request["inputs"]
    fields = signature.inputs
    if not isinstance(inputs, dict):
        if len(fields) > 1:
            raise Refusal("invalid_inputs", f"expected inputs by name: {_names(fields)}, got {_kind(inputs)}")
        inputs = {fields[0].name: inputs}
    if inputs.keys() != {field.name for field in fields}:
        raise Refusal("invalid_inputs", f"expected the inputs {_names(fields)}, got {sorted(inputs)[:20]}")

    # Text would make numpy allocate the longest text's length for every value. All text has quotes, and looking for
    # more of them than the keys need costs next to nothing.
    if body.count(b'"') > 2 + 2 * len(fields):
        for field in fields:
            _refuse_strangers(inputs[field.name], field)
    arrays = {field.name: _array(inputs[field.name], field) for field in fields}
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise Refusal("wrong_shape", f"expected as many rows of each input, got {counts}")
    rows = next(iter(counts.values()))
    if rows > max_rows:
        raise Refusal("too_many_rows", f"expected at most {max_rows} rows in a request, got {rows}: send several")
    return arrays


def _array(rows: Any, field: TensorField) -> NDArray[np.generic]:
    if not isinstance(rows, list) or not rows:
        raise Refusal("wrong_shape", f"input {field.name!r}: expected a list of at least one row, got {_kind(rows)}")
    try:
        array = np.asarray(rows)
    except (ValueError, OverflowError):  # ragged, or deeper than numpy goes
        raise _blame(rows, field) from None
    if array.dtype.kind not in "bifu" or not field.accepts(array.shape[1:]):
        raise _blame(rows, field)
    return _cast(array, field)


def _cast(array: NDArray[Any], field: TensorField) -> NDArray[np.generic]:
    """The array in the field's dtype, if each value is one that the dtype has."""
    dtype = _NUMPY_DTYPES.get(field.dtype) or np.dtype(field.dtype)
    if dtype.kind == "f":
        if array.dtype.kind == "b":
            raise _wrong_dtype(field, 0, "true or false")
        with np.errstate(over="ignore"):
            cast = array.astype(dtype)
        finite = np.isfinite(cast)
        if not finite.all():
            row = int(np.argwhere(~finite)[0][0])
            raise Refusal("not_finite", f"input {field.name!r}, row {row}: a value is too large for {field.dtype}")
        return cast
    if array.size and array.dtype.kind not in ("b" if dtype.kind == "b" else "iu"):
        came = {"f": "numbers with a fraction", "b": "true or false"}.get(array.dtype.kind, "whole numbers")
        raise _wrong_dtype(field, 0, came)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        outside = (array < limits.min) | (array > limits.max)
        if outside.any():
            row = int(np.argwhere(outside)[0][0])
            raise _wrong_dtype(field, row, f"a number outside {limits.min}..{limits.max}")
    return array.astype(dtype)


def _blame(rows: list[Any], field: TensorField) -> Refusal:
    """The refusal that names the first row which does not fit, once it is known that one does not."""
    first: tuple[int, ...] | None = None
    for index, row in enumerate(rows):
        try:
            array = np.asarray(row)
        except (ValueError, OverflowError):
            return Refusal("wrong_shape", f"input {field.name!r}, row {index}: expected {field}, got a ragged list")
        if (stranger := _stranger(row)) is not None:
            return _wrong_dtype(field, index, stranger)
        if not field.accepts(array.shape):
            return Refusal(
                "wrong_shape", f"input {field.name!r}, row {index}: expected {field}, got shape {array.shape}"
            )
        if first is not None and array.shape != first:
            return Refusal(
                "wrong_shape",
                f"input {field.name!r}, row {index}: its shape {array.shape} is not that of the rows before it, {first}; "
                "send rows of different sizes in requests of their own",
            )
        first = array.shape
    return _wrong_dtype(field, 0, "values that have no dtype in common")


def _wrong_dtype(field: TensorField, row: int, came: str) -> Refusal:
    return Refusal("wrong_dtype", f"input {field.name!r}, row {row}: expected {field}, got {came}")


def _refuse_strangers(rows: Any, field: TensorField) -> None:
    for index, row in enumerate(rows if isinstance(rows, list) else []):
        if (stranger := _stranger(row)) is not None:
            raise _wrong_dtype(field, index, stranger)


def _stranger(row: Any) -> str | None:
    """What the first value in a row is that is no number, if there is one."""
    left = [row]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left.extend(reversed(value))
        elif not isinstance(value, (int, float)):
            return _kind(value)
    return None


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words, and short whatever its size."""
    if isinstance(value, Mapping):
        return f"an object with the keys {sorted(value)[:20]}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"the number {value}"


def _names(fields: tuple[TensorField, ...]) -> list[str]:
    return [field.name for field in fields]
