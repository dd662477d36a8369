"""Rows as bytes: bare little-endian numbers, and numpy's .npy format."""

import io
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from emaswap import Signature, TensorField
from service.refusal import Code, Refusal
from service.serving.servable import Rows, Servable
from service.web import refused
from service.web.dialect import Dialect, Parsed
from service.web.json_rows import check_count, fit

_MAX_NPY_HEADER = 10_000


class BareRows(Dialect):
    """`application/octet-stream`: the numbers of all rows, one after the other, as the signature's dtype, little-endian."""

    def parse(self, body: bytes, servable: Servable, max_rows: int) -> Parsed:
        """Return the rows of the one input. The rows must be of one size that the signature tells."""
        field = _only(servable.signature)
        if None in field.shape:
            raise Refusal(
                Code.UNSUPPORTED_MEDIA_TYPE,
                f"input {field.name!r} is {field}: bare bytes do not tell the sizes; send application/x-numpy",
            )
        shape = [size or 0 for size in field.shape]
        row_bytes = math.prod(shape) * np.dtype(_storage(field.dtype)).itemsize
        rows, rest = divmod(len(body), row_bytes) if row_bytes else (0, len(body))
        if rest or not rows:
            raise Refusal(
                Code.WRONG_SHAPE,
                f"input {field.name!r}: expected rows of {row_bytes} bytes, each {field}, got {len(body)} bytes",
            )
        check_count(rows, max_rows)
        return Parsed({field.name: from_bytes(body, field, [rows, *shape])})

    def encode(self, outputs: Rows, servable: Servable, _: object) -> tuple[bytes, bytes]:
        """Return the numbers of the one output."""
        return _lines(servable, b"application/octet-stream"), little_endian(_only_output(outputs)).tobytes()


class NpyRows(Dialect):
    """`application/x-numpy`: one array as `numpy.save` writes it, rows first."""

    def parse(self, body: bytes, servable: Servable, max_rows: int) -> Parsed:
        """Return the rows of the one input, in the dtype of the signature where that holds their values."""
        field = _only(servable.signature)
        array = _read_npy(body)
        if not array.ndim or not len(array):
            raise Refusal(Code.WRONG_SHAPE, f"input {field.name!r}: expected at least one row, got shape {array.shape}")
        check_count(len(array), max_rows)
        return Parsed({field.name: fit(array, field)})

    def encode(self, outputs: Rows, servable: Servable, _: object) -> tuple[bytes, bytes]:
        """Return the one output."""
        file = io.BytesIO()
        np.lib.format.write_array(file, _only_output(outputs), allow_pickle=False)
        return _lines(servable, b"application/x-numpy"), file.getvalue()


def from_bytes(data: bytes | memoryview, field: TensorField, shape: Sequence[int]) -> NDArray[np.generic]:
    """Return bare little-endian numbers, as many as the shape takes, as rows of a field.

    Raises `Refusal` for a value that is not finite, or a truth value that is neither 0 nor 1.
    """
    stored = np.frombuffer(data, _storage(field.dtype)).reshape(shape)
    if field.dtype == "bfloat16":
        return fit((stored.astype(np.uint32) << 16).view(np.float32), field)
    if field.dtype == "bool":
        if (stored > 1).any():
            raise Refusal(Code.WRONG_DTYPE, f"input {field.name!r}: expected bytes of 0 or 1 for {field}")
        return stored.astype(np.bool_)
    return fit(stored, field)


def little_endian(output: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return an array with the bytes of each number in the order in which they are sent."""
    return output.astype(output.dtype.newbyteorder("<"), copy=False)


def _storage(dtype: str) -> np.dtype[np.generic]:
    """Return the dtype of numpy's whose bytes are those of a field's dtype."""
    return np.dtype({"bfloat16": "<u2", "bool": "u1"}.get(dtype) or np.dtype(dtype).newbyteorder("<"))


def _read_npy(body: bytes) -> NDArray[np.generic]:
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(file, max_header_size=_MAX_NPY_HEADER)
    except (ValueError, OSError, EOFError) as error:
        raise Refusal(Code.INVALID_INPUTS, f"the body is not an array as numpy.save writes it: {error}") from None
    rest = memoryview(body)[file.tell() :]
    if dtype.kind not in "biuf":
        raise Refusal(Code.WRONG_DTYPE, f"expected numbers or truth values, got an array of {dtype}")
    if math.prod(shape) * dtype.itemsize != len(rest):
        raise Refusal(
            Code.WRONG_SHAPE, f"an array of {dtype} of shape {shape} does not have {len(rest)} bytes, as there are"
        )
    return np.frombuffer(rest, dtype).reshape(shape, order="F" if is_fortran else "C")


def _only(signature: Signature) -> TensorField:
    if len(signature.inputs) > 1:
        names = [field.name for field in signature.inputs]
        raise Refusal(Code.UNSUPPORTED_MEDIA_TYPE, f"this model has the inputs {names}: send them as application/json")
    return signature.inputs[0]


def _only_output(outputs: Rows) -> NDArray[np.generic]:
    if len(outputs) > 1:
        raise Refusal(
            Code.NOT_ACCEPTABLE, f"this model has the outputs {list(outputs)}: they can only be had as application/json"
        )
    return next(iter(outputs.values()))


def _lines(servable: Servable, kind: bytes) -> bytes:
    return b"content-type: " + kind + b"\r\n" + refused.as_lines(refused.identity(servable))
