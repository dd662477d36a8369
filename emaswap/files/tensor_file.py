"""Tensors to and from a safetensors file: written with its digest, read and verified in one pass.

The format is that of https://github.com/huggingface/safetensors: eight bytes of little-endian header length,
a JSON header, the tensors' bytes without holes. The files are ordinary ones, readable by the `safetensors` package. This
module knows neither stores nor modules; it never unpickles and never maps a file into memory.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from emaswap.errors import BadVersion, EmaswapError, Reason, Short
from emaswap.files import memory
from emaswap.files.digest import Algorithm, Digest, algorithm_of, new_hasher
from emaswap.tensors import dtype_name

MAX_HEADER_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20
_MAX_DIMENSIONS = 32
# Tensor bytes start on a cache line, so that views into one buffer are aligned for every dtype.
_ALIGNMENT = 64

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_SIZES = {dtype_name(dtype): dtype.itemsize for dtype in _NAMES}

Size = Annotated[int, Field(ge=0, le=1 << 48)]


class Blob(BaseModel):
    """What names a file's content: the digest of its bytes, and how many there are."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    digest: Digest
    size: Size


@dataclass(frozen=True)
class TensorFile:
    """What a tensor file holds: named tensors, and a small text mapping."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


def write(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    algorithm: Algorithm = "blake3",
) -> Blob:
    """Write tensors (any device, any strides) to an open file, digesting the bytes as they stream by."""
    # Widest dtype first keeps every tensor aligned without holes between them.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    if "__metadata__" in tensors:
        raise EmaswapError("a tensor cannot be named '__metadata__' in a safetensors file")
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _NAMES:
            raise EmaswapError(f"tensor {name!r} has dtype {tensor.dtype}, which a safetensors file cannot hold")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % _ALIGNMENT)
    if len(encoded) > MAX_HEADER_BYTES:
        raise EmaswapError(f"the header of {len(tensors)} tensors is larger than {MAX_HEADER_BYTES} bytes")

    hasher = new_hasher(algorithm)
    for part in _parts(len(encoded).to_bytes(8, "little") + encoded, (tensor for _, tensor in ordered)):
        hasher.update(part)
        file.write(part)
    return Blob(digest=f"{algorithm}:{hasher.hexdigest()}", size=8 + len(encoded) + end)


def _parts(head: bytes, tensors: Iterator[Tensor]) -> Iterator[memoryview]:
    yield memoryview(head)
    for tensor in tensors:
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        # Strides of sizes 0 and 1 are arbitrary even when contiguous, and a view as bytes minds them.
        data: memoryview = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data
        for begin in range(0, len(data), _CHUNK_BYTES):
            yield data[begin : begin + _CHUNK_BYTES]


def fits(size: int, tensors: Mapping[str, tuple[str, Sequence[int]]]) -> bool:
    """Return whether a file of this size has no more than these tensors in it, given by their dtypes' names and shapes."""
    total = sum(math.prod(shape) * _SIZES.get(name, 0) for name, shape in tensors.values())
    return size <= 8 + MAX_HEADER_BYTES + total


Memory = Callable[[int], NDArray[np.uint8]]
"""What supplies memory for so many bytes, or raises `Short`."""


def private_memory(count: int) -> NDArray[np.uint8]:
    """Return fresh memory of this process. Raises `Short` when there is not so much."""
    memory.require(count, "a tensor file")
    try:
        return np.empty(count, dtype=np.uint8)
    except MemoryError:
        raise Short(f"there is no memory for a tensor file of {count} bytes") from None


def read(file: BinaryIO, blob: Blob, into: Memory = private_memory) -> TensorFile:
    """Read a file once into memory, verify it, and return tensors that live in just those verified bytes.

    `blob.size` bounds what is read. The memory must be one that nobody else writes to. Raises `BadVersion` when size,
    digest or header are not what they should be, and `Short` when there is no memory for so much.
    """
    if file.seekable():
        there = file.seek(0, os.SEEK_END)
        file.seek(0)
        _check_count(there, blob)
    # One byte more than expected is asked for, so that a longer file shows without being read whole.
    buffer = into(blob.size + 1)
    view: memoryview = buffer.data
    hasher = new_hasher(algorithm_of(blob.digest))
    size = 0
    while size < len(view):
        count = file.readinto(view[size : size + _CHUNK_BYTES])  # type: ignore[attr-defined]
        if not count:
            break
        hasher.update(view[size : size + count])
        size += count
    _check_count(size, blob)
    found = f"{algorithm_of(blob.digest)}:{hasher.hexdigest()}"
    if found != blob.digest:
        raise BadVersion(Reason.DIGEST_MISMATCH, f"expected {blob.digest}, the bytes give {found}")
    return parse(buffer[:size])


def _check_count(count: int, blob: Blob) -> None:
    if count != blob.size:
        came = f"{count} bytes" if count < blob.size else "more"
        raise BadVersion(Reason.SIZE_MISMATCH, f"expected {blob.size} bytes, the file has {came}")


def parse(buffer: NDArray[np.uint8]) -> TensorFile:
    """Return the tensors in the bytes of a file that was verified. Raises `BadVersion` when the header cannot be right."""
    if len(buffer) < 8:
        raise BadVersion(Reason.HEADER_INVALID, f"a tensor file has at least 8 bytes, this one has {len(buffer)}")
    length = int.from_bytes(buffer[:8].tobytes(), "little")
    if length > MAX_HEADER_BYTES:
        raise BadVersion(
            Reason.HEADER_TOO_LARGE, f"the header claims {length} bytes, at most {MAX_HEADER_BYTES} are read"
        )
    if length > len(buffer) - 8:
        raise BadVersion(Reason.HEADER_INVALID, f"the header claims {length} bytes of the {len(buffer) - 8} there are")
    try:
        header = json.loads(buffer[8 : 8 + length].tobytes().decode("utf-8"))
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in [*metadata.keys(), *metadata.values()]):
            raise ValueError("__metadata__ maps text to text")
        entries = [(*_entry(spec), name) for name, spec in header.items()]
        "".join(header).encode()  # a lone surrogate in a name could not be shown to anybody
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise BadVersion(Reason.HEADER_INVALID, f"{type(error).__name__}: {error}") from None

    data = buffer[8 + length :]
    tensors: dict[str, Tensor] = {}
    reached = 0
    for begin, end, shape, dtype, name in sorted(entries, key=lambda entry: entry[:2]):
        if begin != reached or end - begin != math.prod(shape) * dtype.itemsize or end > len(data):
            raise BadVersion(
                Reason.HEADER_INVALID,
                f"tensor {name!r} {dtype_name(dtype)}{list(shape)} does not fit its bytes {begin}..{end} of {len(data)}",
            )
        reached = end
        tensors[name] = _view(data[begin:end], dtype).view(shape)
    if reached != len(data):
        raise BadVersion(Reason.HEADER_INVALID, f"{len(data) - reached} bytes belong to no tensor")
    return TensorFile(tensors, metadata)


def _entry(spec: dict[str, object]) -> tuple[int, int, tuple[int, ...], torch.dtype]:
    """Offsets, shape and dtype of one header entry, all of them plain non-negative whole numbers."""
    shape, offsets, name = spec["shape"], spec["data_offsets"], spec["dtype"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError("shape and data_offsets are lists, the latter of two numbers")
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions are more than {_MAX_DIMENSIONS}")
    if any(type(number) is not int or not 0 <= number < 1 << 48 for number in [*shape, *offsets]):
        raise ValueError("shape and data_offsets hold whole numbers, not negative and below 2^48")
    if math.prod(max(size, 1) for size in shape) >= 1 << 48:
        raise ValueError("a tensor has fewer than 2^48 numbers, whichever of its sizes is 0")
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"unknown dtype {name!r}")
    return offsets[0], offsets[1], tuple(shape), _DTYPES[name]


def _view(data: NDArray[np.uint8], dtype: torch.dtype) -> Tensor:
    if data.size == 0:
        return torch.empty(0, dtype=dtype)
    if data.ctypes.data % dtype.itemsize:
        data = data.copy()  # other writers need not align
    return torch.from_numpy(data).view(dtype)
