"""Rows as JSON: from a request to arrays that fit the signature, and from outputs to an answer."""

import weakref
from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from emaswap import Signature, TensorField
from service.refusal import Code, Refusal
from service.serving.servable import Rows, Servable
from service.web import refused
from service.web.dialect import Dialect, Parsed

# numpy has no bfloat16: such an input is parsed as float32 and narrowed by torch.
_TOGETHER = ("float32", "float64")
_NUMPY_DTYPES = {"bfloat16": np.dtype("float32")}

LARGE_BYTES = 64 << 10
"""A body of more bytes is checked for what it is made of before it is parsed, and off the event loop."""

# In the place of a size that may vary.
_MANY = 4096
# Fewer texts are looked at, so that the refusal can name the row of the first one.
_MOST_QUOTES = 1 << 20

# What torch rounds to infinity: half a step above the largest bfloat16.
_BFLOAT16_END = float.fromhex("0x1.FFp127")


def parse_together(bodies: list[bytes], signature: Signature, max_rows: int) -> list[tuple[Rows, int]] | None:
    """Return the inputs that each of many small bodies holds, and how many rows, if all of them fit.

    Checks once what `parse` would check for each. `None` when one does not fit, or for inputs that are not one vector
    of floats: then each has to be parsed by itself, also to learn what is wrong.
    """
    field = signature.inputs[0]
    if len(signature.inputs) > 1 or field.dtype not in _TOGETHER or len(field.shape) != 1:
        return None
    rows: list[Any] = []
    ends = [0]
    try:
        for body in bodies:
            # Only the key "inputs" has quotes. Its letters are not those of true, false and null, which numpy takes.
            if body.count(b'"') != 2 or b"r" in body or b"l" in body:
                return None
            inputs = orjson.loads(body)["inputs"]
            if type(inputs) is not list or not 0 < len(inputs) <= max_rows:
                return None
            rows += inputs
            ends.append(len(rows))
        with np.errstate(over="ignore"):
            stacked = np.array(rows, dtype=field.dtype)
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    if stacked.ndim != 2 or not field.accepts(stacked.shape[1:]) or not np.isfinite(stacked).all():
        return None
    name = field.name
    return [({name: stacked[first:end]}, end - first) for first, end in pairwise(ends)]


def parse(body: bytes, signature: Signature, max_rows: int) -> Rows:
    """Return the inputs that a request's body holds, by name and in the signature's order.

    Raises `Refusal`, which names the first row that does not fit, what was expected of it and what came.
    """
    if len(body) > LARGE_BYTES:
        _refuse_structure(body, signature, max_rows)
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
    check_counts(counts, max_rows)

    # For text, numpy would allocate the longest text's length for every value; beside a number, it takes true for 1.
    # Both leave traces in the body, where they are quickly found.
    suspicious = body.count(b'"') > quotes or b"true" in body or b"false" in body
    return {field.name: to_array(inputs[field.name], field, suspicious=suspicious) for field in fields}


def check_counts(counts: Mapping[str, int], max_rows: int) -> None:
    """Raise `Refusal` unless all inputs, whose numbers of rows these are, have equally many, and not too many."""
    if len(set(counts.values())) > 1:
        raise Refusal(Code.WRONG_SHAPE, f"expected the same number of rows in each input, got {dict(counts)}")
    check_count(next(iter(counts.values())), max_rows)


def check_count(rows: int, max_rows: int) -> None:
    """Raise `Refusal` for more rows than a request may have."""
    if rows > max_rows:
        raise Refusal(
            Code.TOO_MANY_ROWS, f"expected at most {max_rows} rows in a request, got {rows}; send several requests"
        )


def _refuse_structure(body: bytes, signature: Signature, max_rows: int) -> None:
    """Raise `Refusal` for a large body of more lists, objects or texts than any request can have.

    They would take twenty times its bytes as objects, and the interpreter's lock for a second while they are made and
    collected. Counting takes microseconds.
    """
    lists, numbers = len(signature.inputs), 0
    for field in signature.inputs:
        values = max_rows
        for size in field.shape:
            lists += values
            values *= _MANY if size is None else size
        numbers += values
    one_a_row = all(not field.shape for field in signature.inputs)
    for sign, most, what, code in (
        (b"{", 2, "objects", Code.WRONG_SHAPE),
        (b"[", lists, "lists", Code.WRONG_SHAPE),
        (b'"', _MOST_QUOTES, "quotes", Code.WRONG_DTYPE),
        (b",", numbers + _MANY, "values", Code.TOO_MANY_ROWS if one_a_row else Code.WRONG_SHAPE),
    ):
        if (count := body.count(sign)) > most:
            raise Refusal(code, f"expected at most {max_rows} rows, each {_fields(signature)}, got {count} {what}")


def _fields(signature: Signature) -> str:
    return " and ".join(str(field) for field in signature.inputs)


class JsonRows(Dialect):
    """`application/json`: rows as lists of numbers."""

    def parse(self, body: bytes, servable: Servable, max_rows: int) -> Parsed:
        """Return the inputs of one body."""
        return Parsed(parse(body, servable.signature, max_rows))

    def encode(self, outputs: Rows, servable: Servable, _: object) -> tuple[bytes, bytes]:
        """Return the answer to one request."""
        envelope = Envelope(servable)
        return envelope.lines, envelope.bodies(outputs, [len(next(iter(outputs.values())))])[0]


class Envelope:
    """What all answers of one version have in common; it puts outputs into bodies."""

    def __init__(self, servable: Servable) -> None:
        # Not the servable itself: what is not live any more is freed when its last request has ended.
        self._servable = weakref.ref(servable)
        self._labels = servable.signature.labels
        self.lines = refused.PLAIN + refused.as_lines(refused.identity(servable))
        model = {
            "name": servable.manifest.model,
            "version": servable.version,
            "step": servable.manifest.training.step,
            "digest": servable.digest,
        }
        self._end = b',"model":' + orjson.dumps(model) + b"}"
        # Where there is one output of numbers, one a row or several, a row is what stands between brackets.
        self._is_flat = len(servable.signature.outputs) == 1 and len(servable.signature.outputs[0].shape) == 1

    def is_for(self, servable: Servable) -> bool:
        """Return whether this is the envelope of a version."""
        return self._servable() is servable

    def bodies(self, outputs: Rows, sizes: Sequence[int]) -> list[bytes]:
        """Return the body of each request's answer: outputs, predictions where there are labels, and who made them.

        Args:
            outputs: the outputs of all requests, stacked.
            sizes: how many rows each request has.

        Raises:
            Refusal: there are not as many outputs as labels.
        """
        if self._is_flat and self._labels is None:
            (output,) = outputs.values()
            rows = _dumps(output)[2:-2].split(b"],[")
            end = self._end
            if len(rows) == len(sizes):
                return [b'{"outputs":[[%b]]%b' % (row, end) for row in rows]
            parts = iter(rows)
            return [b'{"outputs":[[%b]]%b' % (b"],[".join(islice(parts, size)), end) for size in sizes]
        first, bodies = 0, []
        for size in sizes:
            bodies.append(self._body({name: output[first : first + size] for name, output in outputs.items()}))
            first += size
        return bodies

    def _body(self, outputs: Rows) -> bytes:
        body: dict[str, Any] = {"outputs": outputs if len(outputs) > 1 else next(iter(outputs.values()))}
        if self._labels is not None:
            body["predictions"] = _predictions(next(iter(outputs.values())), self._labels)
        return _dumps(body)[:-1] + self._end


def _dumps(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


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


def to_array(rows: list[Any], field: TensorField, *, suspicious: bool = True) -> NDArray[np.generic]:
    """Return rows as JSON has them as an array that fits the field. Raises `Refusal` naming the first that does not.

    Where a body is not `suspicious`, it is known that there is neither a text nor a truth value in it.
    """
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


def fit(array: NDArray[Any], field: TensorField) -> NDArray[np.generic]:
    """Return an array of rows in the dtype of a field. Raises `Refusal` where it does not fit, or a value is not finite."""
    if not field.accepts(array.shape[1:]):
        raise Refusal(Code.WRONG_SHAPE, f"input {field.name!r}: expected rows of {field}, got shape {array.shape[1:]}")
    cast = _cast(array, field)
    if cast is None:
        raise Refusal(
            Code.WRONG_DTYPE, f"input {field.name!r}: expected {field}, got {array.dtype} that it cannot hold"
        )
    return cast


def _cast(array: NDArray[Any], field: TensorField) -> NDArray[np.generic] | None:
    """Return the array in the field's dtype, or `None` when a value is of another kind or out of range."""
    dtype = _numpy_dtype(field)
    if array.size == 0:
        return array.astype(dtype)
    if dtype.kind == "f":
        if array.dtype.kind == "b":
            return None
        # By way of float64, as `parse_together` does it: a value must not depend on its company.
        if array.dtype.kind != "f":
            array = array.astype(np.float64)
        with np.errstate(over="ignore"):
            cast = array.astype(dtype)
        finite = np.isfinite(cast)
        if field.dtype == "bfloat16":
            finite &= np.abs(cast) < _BFLOAT16_END
        if not finite.all():
            row = int(np.argwhere(~finite)[0][0])
            raise Refusal(
                Code.NOT_FINITE,
                f"input {field.name!r}, row {row}: a value is not finite, or too large for {field.dtype}",
            )
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
