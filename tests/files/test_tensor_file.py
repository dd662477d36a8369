"""Tensor files: written with their digest, read and verified in one pass."""

import hashlib
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from blake3 import blake3
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from emaswap import BadVersion, EmaswapError, Reason, Short
from emaswap.files.digest import Algorithm, digest_of
from emaswap.files.tensor_file import MAX_HEADER_BYTES, Blob, TensorFile, read, write
from emaswap.tensors import dtype_name, named_tensors, not_finite
from tests.models import Everything

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=map(dtype_name, DTYPES.values()))

names = st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda name: name != "__metadata__")


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random bytes (of a bool, 0 or 1) as a tensor: NaNs and infinities are among them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A tensor of any dtype, shape and strides."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    tensor = random_tensor(dtype, tuple(shape), draw(st.integers(0, 1000)))
    if draw(st.booleans()):
        tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    if draw(st.booleans()) and shape:
        tensor = tensor[draw(st.integers(0, 2)) :: draw(st.integers(1, 3))]
    if draw(st.booleans()):
        tensor = tensor.expand(draw(st.integers(0, 3)), *tensor.shape)
    return tensor


def bits(tensor: Tensor) -> list[int]:
    """The tensor's bytes, so that a NaN equals itself."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    raw: list[int] = flat.view(torch.uint8).tolist()
    return raw


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names, dtypes, shapes and bytes."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor)


def written(tensors: dict[str, Tensor], algorithm: Algorithm = "blake3") -> tuple[bytes, Blob]:
    """The bytes of a tensor file, and their identity."""
    file = io.BytesIO()
    blob = write(file, tensors, algorithm=algorithm)
    return file.getvalue(), blob


def parsed(data: bytes) -> TensorFile:
    """Read bytes whose digest and size are right."""
    return read(io.BytesIO(data), Blob(digest=digest_of(data), size=len(data)))


def with_header(header: object, data: bytes = b"") -> bytes:
    """A tensor file with any header: JSON of a value, or bytes as they are."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, object]:
    """A header entry, by default of two fp32 numbers."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# -- round trips ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.dictionaries(names, tensors(), max_size=5), st.sampled_from(["blake3", "sha256"]))
def test_what_is_written_is_read(state: dict[str, Tensor], algorithm: Algorithm) -> None:
    """Tensors of any dtype, shape and strides come back with the same bits, under the same names."""
    data, blob = written(state, algorithm)
    assert_same(read(io.BytesIO(data), blob).tensors, state)


@settings(deadline=None)
@given(st.dictionaries(names, tensors(), max_size=5))
def test_the_safetensors_package_reads_what_is_written(state: dict[str, Tensor]) -> None:
    """A written file is an ordinary safetensors file."""
    data, _ = written(state)
    assert_same(safetensors.torch.load(data), state)


@settings(deadline=None)
@given(st.dictionaries(names, tensors(), max_size=5), st.dictionaries(names, names, max_size=3))
def test_what_the_safetensors_package_writes_is_read(state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Files of the safetensors package come back whole, metadata too."""
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    found = parsed(safetensors.torch.save(state, metadata or None))
    assert_same(found.tensors, state)
    assert found.metadata == metadata


def test_files_pass_between_both_packages_on_disk(tmp_path: Path) -> None:
    """A file that one package saves, the other loads, either way."""
    state = dict(Everything().state_dict())
    del state["decode.weight"]
    with (tmp_path / "ours").open("wb") as file:
        write(file, state)
    assert_same(safetensors.torch.load_file(tmp_path / "ours"), state)
    safetensors.torch.save_file(state, tmp_path / "theirs")
    data = (tmp_path / "theirs").read_bytes()
    with (tmp_path / "theirs").open("rb", buffering=0) as unbuffered:
        assert_same(read(unbuffered, Blob(digest=digest_of(data), size=len(data))).tensors, state)


@dtypes
@pytest.mark.parametrize("padding", range(8))
def test_tensors_need_not_be_aligned(dtype: torch.dtype, padding: int) -> None:
    """Other writers may put a tensor's bytes anywhere: it is read right, and can be computed with."""
    name = next(name for name, listed in DTYPES.items() if listed is dtype)
    tensor = random_tensor(dtype, (3,))
    header = json.dumps({"x": entry([3], [0, 3 * dtype.itemsize], name)}).encode() + b" " * padding
    found = parsed(with_header(header, bytes(bits(tensor)))).tensors["x"]
    assert bits(found) == bits(tensor)
    assert found.data_ptr() % dtype.itemsize == 0


def test_metadata_comes_back() -> None:
    """A small text mapping travels with the tensors."""
    file = io.BytesIO()
    write(file, {}, metadata={"kind": "probe", "naïve": "✓"})
    assert parsed(file.getvalue()).metadata == {"kind": "probe", "naïve": "✓"}


def test_equal_tensors_make_equal_files() -> None:
    """The order in which tensors are given does not show in the file: same content, same digest."""
    a, b = torch.ones(2), torch.zeros(3, dtype=torch.int64)
    assert written({"a": a, "b": b}) == written({"b": b, "a": a})


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.arange(4.0)[::4], id="one of four"),
        pytest.param(torch.tensor(0.0).expand(1), id="one expanded"),
        pytest.param(torch.tensor(0.0).expand(0), id="none expanded"),
        pytest.param(torch.arange(4.0)[4::2], id="none of four"),
        pytest.param(torch.tensor(0.0).expand(3), id="three expanded"),
        pytest.param(torch.arange(6.0).view(2, 3).T, id="transposed"),
        pytest.param(torch.arange(6.0)[1::2], id="every other"),
    ],
)
def test_strides_do_not_matter(tensor: Tensor) -> None:
    """A view of any strides is written as what it shows, be it of one number or of none."""
    data, blob = written({"x": tensor})
    assert read(io.BytesIO(data), blob).tensors["x"].tolist() == tensor.tolist()


def test_a_conjugate_view_is_written_as_what_it_shows() -> None:
    """A complex tensor that torch conjugates lazily is written with its conjugated values."""
    conjugated = torch.tensor([1 + 2j]).conj()
    data, blob = written({"x": conjugated})
    assert read(io.BytesIO(data), blob).tensors["x"].tolist() == [1 - 2j]


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        pytest.param({"x": torch.ones(1, dtype=torch.complex128)}, "'x' has dtype", id="complex128"),
        pytest.param({"x": torch.ones(1).to(torch.float8_e4m3fn)}, "'x' has dtype", id="float8"),
        pytest.param({"__metadata__": torch.ones(1)}, "__metadata__", id="the name of the metadata"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(state: dict[str, Tensor], problem: str) -> None:
    """A tensor that could not be read back is refused by name, before anything is written."""
    file = io.BytesIO()
    with pytest.raises(EmaswapError, match=problem):
        write(file, state)
    assert file.getvalue() == b""


def test_a_header_that_could_not_be_read_back_is_not_written() -> None:
    """More names than a reader accepts are refused at writing."""
    file = io.BytesIO()
    with pytest.raises(EmaswapError, match="header of 1 tensors is larger than"):
        write(file, {"x" * MAX_HEADER_BYTES: torch.ones(1)})
    assert file.getvalue() == b""


# -- digest and size -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.dictionaries(names, tensors(), max_size=3))
def test_digest_and_size_are_those_of_the_bytes(state: dict[str, Tensor]) -> None:
    """What `write` returns is what anyone would work out from the file."""
    data, blob = written(state, "blake3")
    assert blob == Blob(digest=f"blake3:{blake3(data).hexdigest()}", size=len(data))
    data, blob = written(state, "sha256")
    assert blob == Blob(digest=f"sha256:{hashlib.sha256(data).hexdigest()}", size=len(data))


def test_a_file_of_several_megabytes_is_digested_whole() -> None:
    """Bytes beyond the first slice that is read or written count, too."""
    state = {"x": torch.arange(700_000, dtype=torch.float32), "y": torch.arange(300_001, dtype=torch.int8)}
    data, blob = written(state)
    assert blob == Blob(digest=digest_of(data), size=len(data))
    found = read(io.BytesIO(data), blob).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


DATA, BLOB = written({"weight": torch.arange(6.0).view(2, 3), "steps": torch.tensor(7), "mask": torch.tensor([True])})


@settings(deadline=None)
@given(st.integers(0, 8 * len(DATA) - 1), st.sampled_from(["blake3", "sha256"]))
def test_a_flipped_bit_is_found(bit: int, algorithm: Algorithm) -> None:
    """Whichever bit of a file flips, it is rejected for its digest."""
    bent = bytearray(DATA)
    bent[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadVersion) as raised:
        read(io.BytesIO(bent), Blob(digest=digest_of(DATA, algorithm), size=len(DATA)))
    assert raised.value.reason == Reason.DIGEST_MISMATCH


@settings(deadline=None)
@given(st.integers(0, len(DATA) - 1))
def test_a_truncated_file_is_found(length: int) -> None:
    """At whatever length a file was cut, it is rejected for its size, and both sizes are told."""
    with pytest.raises(BadVersion, match=f"expected {len(DATA)} bytes, the file has {length} bytes") as raised:
        read(io.BytesIO(DATA[:length]), BLOB)
    assert raised.value.reason == Reason.SIZE_MISMATCH


@settings(deadline=None)
@given(st.binary(min_size=1))
def test_a_longer_file_is_found(more: bytes) -> None:
    """A file with bytes after the expected ones is rejected for its size, although it begins right."""
    with pytest.raises(BadVersion) as raised:
        read(io.BytesIO(DATA + more), BLOB)
    assert raised.value.reason == Reason.SIZE_MISMATCH


@pytest.mark.parametrize("size", [0, 1, 100, 2 << 20])
def test_no_more_than_the_claimed_size_is_read(tmp_path: Path, size: int) -> None:
    """Of a file that is larger than claimed, one byte more than the claim is read, and not the rest."""
    path = tmp_path / "large"
    path.write_bytes(b"x" * (5 << 20))
    with path.open("rb", buffering=0) as file:
        with pytest.raises(BadVersion) as raised:
            read(file, Blob(digest=digest_of(b""), size=size))
        assert file.tell() <= size + 1
    assert raised.value.reason == Reason.SIZE_MISMATCH


@pytest.mark.parametrize("size", [1 << 44, 1 << 48])
def test_a_claim_beyond_all_memory_is_a_wrong_size(size: int) -> None:
    """A small file that is claimed to be larger than memory is rejected for its size, before memory is asked for."""
    with pytest.raises(BadVersion) as raised:
        read(io.BytesIO(DATA), Blob(digest=BLOB.digest, size=size))
    assert raised.value.reason == Reason.SIZE_MISMATCH


def test_a_file_beyond_all_memory_is_not_read(tmp_path: Path) -> None:
    """It is no fault of the file's: there may be memory for it elsewhere, or later."""
    path = tmp_path / "giant"
    with path.open("wb") as file:
        file.truncate(1 << 43)
    with path.open("rb") as file:
        with pytest.raises(Short, match="a tensor file takes 8192.0 GiB of memory"):
            read(file, Blob(digest=digest_of(b""), size=1 << 43))
        assert file.tell() == 0


def test_what_was_read_is_private() -> None:
    """Changing the file after reading changes no tensor: the verified bytes are the bytes used."""
    file = io.BytesIO(DATA)
    found = read(file, BLOB)
    file.seek(0)
    file.write(bytes(len(DATA)))
    assert found.tensors["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


# -- hostile headers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claimed", [MAX_HEADER_BYTES + 1, 1 << 62, 2**64 - 1], ids=["one too many", "2^62", "2^64-1"])
def test_a_giant_header_is_not_parsed(claimed: int) -> None:
    """A header that claims more than the cap is rejected for that, before a byte of it is parsed."""
    with pytest.raises(BadVersion) as raised:
        parsed(claimed.to_bytes(8, "little") + b"{}")
    assert raised.value.reason == Reason.HEADER_TOO_LARGE


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty file"),
        pytest.param(b"\0" * 7, id="no room for the length"),
        pytest.param(with_header(b""), id="empty header"),
        pytest.param((1000).to_bytes(8, "little") + b"{}", id="header longer than the file"),
        pytest.param((4).to_bytes(8, "little") + b"{}", id="header a little longer than the file"),
        pytest.param(with_header(b"not JSON"), id="not JSON"),
        pytest.param(with_header(b"\xff\xfe\xfd"), id="not text"),
        pytest.param(with_header(b"{}{}"), id="two values"),
        pytest.param(with_header([]), id="a list"),
        pytest.param(with_header(None), id="null"),
        pytest.param(with_header("text"), id="a text"),
        pytest.param(with_header(7), id="a number"),
        pytest.param(with_header({"x": 7}), id="an entry that is a number"),
        pytest.param(with_header({"x": []}), id="an entry that is a list"),
        pytest.param(with_header({"x": {}}), id="an entry that is empty"),
        pytest.param(with_header({"__metadata__": []}), id="metadata that is a list"),
        pytest.param(with_header({"__metadata__": {"a": 1}}), id="metadata that is not text"),
        pytest.param(with_header({"x": entry()}, bytes(4)), id="offsets past the end"),
        pytest.param(with_header({"x": entry()}, bytes(9)), id="trailing bytes"),
        pytest.param(with_header({}, b"x"), id="bytes without tensors"),
        pytest.param(with_header({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12)), id="overlapping"),
        pytest.param(with_header({"x": entry(), "y": entry()}, bytes(8)), id="the same bytes twice"),
        pytest.param(with_header({"x": entry(), "y": entry(offsets=[12, 20])}, bytes(20)), id="a hole between"),
        pytest.param(with_header({"x": entry(offsets=[4, 12])}, bytes(12)), id="a hole before"),
        pytest.param(with_header({"x": entry(offsets=[8, 0])}, bytes(8)), id="offsets swapped"),
        pytest.param(with_header({"x": entry(offsets=[0])}, bytes(8)), id="one offset"),
        pytest.param(with_header({"x": entry(offsets=[0, 8, 8])}, bytes(8)), id="three offsets"),
        pytest.param(with_header({"x": entry(offsets=[-8, 0])}), id="negative offsets"),
        pytest.param(with_header({"x": entry(shape=[-2])}, bytes(8)), id="negative shape"),
        pytest.param(with_header({"x": entry(shape=[-1, -2])}, bytes(8)), id="negative shape of a right size"),
        pytest.param(with_header({"x": entry(shape=[2.0])}, bytes(8)), id="a float in the shape"),
        pytest.param(with_header({"x": entry(shape=[True, 2])}, bytes(8)), id="a bool in the shape"),
        pytest.param(with_header({"x": entry(offsets=[False, 8])}, bytes(8)), id="a bool in the offsets"),
        pytest.param(with_header({"x": entry(shape=["2"])}, bytes(8)), id="a text in the shape"),
        pytest.param(with_header({"x": entry(shape=2)}, bytes(8)), id="a shape that is a number"),
        pytest.param(with_header({"x": entry(shape=[2**62, 4])}), id="a shape that overflows 64 bits to 0"),
        pytest.param(with_header({"x": entry([2**32, 2**32], [0, 0])}), id="a product that overflows 64 bits"),
        pytest.param(with_header({"x": entry([10**4000], [0, 8])}, bytes(8)), id="a number of 4000 digits"),
        pytest.param(with_header(b'{"x":' + b"9" * 5000 + b"}"), id="a number of 5000 digits"),
        pytest.param(with_header({"x": entry(offsets=[0, 2**63])}, bytes(8)), id="an offset beyond 64 bits"),
        pytest.param(with_header({"x": entry(dtype="F128")}, bytes(8)), id="unknown dtype"),
        pytest.param(with_header({"x": entry(dtype=["F32"])}, bytes(8)), id="a dtype that is a list"),
        pytest.param(with_header({"x": entry(dtype="f32")}, bytes(8)), id="a dtype in lower case"),
        pytest.param(with_header(b"[" * 100_000), id="deep lists"),
        pytest.param(with_header(b'{"x":' * 100_000), id="deep objects"),
        pytest.param(with_header(b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)), id="NaN"),
        pytest.param(with_header({"\ud800": entry()}, bytes(8)), id="a name that is no text"),
        pytest.param(with_header({"x": entry([1] * 10_000, [0, 4])}, bytes(4)), id="10,000 dimensions"),
    ],
)
def test_a_hostile_header_is_rejected(data: bytes) -> None:
    """A file with a right digest and a wrong header is a bad version, and nothing worse."""
    with pytest.raises(BadVersion) as raised:
        parsed(data)
    assert raised.value.reason == Reason.HEADER_INVALID


def test_a_header_bomb_is_rejected_at_once() -> None:
    """A shape of very many large sizes is not multiplied out, and the reason stays short enough to show."""
    data = with_header({"x": entry([2**47] * 50_000, [0, 4])}, bytes(4))
    before_s = time.process_time()
    with pytest.raises(BadVersion) as raised:
        parsed(data)
    assert time.process_time() - before_s < 1
    assert len(raised.value.detail) < 1000


numbers = st.one_of(
    st.integers(0, 16),
    st.integers(),
    st.sampled_from([2**31, 2**47, 2**62, 2**63, 2**64, -1]),
    st.floats(),
    st.booleans(),
)
json_like: st.SearchStrategy[Any] = st.recursive(
    st.none() | numbers | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F8_E4M3", ""]) | json_like,
        "shape": st.lists(numbers, max_size=4) | json_like,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | json_like,
    },
)
headers = (
    st.dictionaries(st.text(st.characters(), max_size=5) | st.just("__metadata__"), entries | json_like, max_size=3)
    | json_like
)


def assert_read_or_rejected(data: bytes) -> None:
    """The bytes are rejected for their header, or are tensors that can be looked at."""
    try:
        found = parsed(data)
    except BadVersion as rejected:
        reason = rejected.reason
    else:
        assert sum(tensor.nbytes for tensor in found.tensors.values()) <= len(data)
        not_finite(found.tensors)
        return
    assert reason in (Reason.HEADER_TOO_LARGE, Reason.HEADER_INVALID)


@settings(deadline=None, max_examples=400)
@given(headers, st.binary(max_size=32))
@example({"x": entry([1] * 65, [0, 4])}, bytes(4))
@example({"x": entry([0, 2**47, 2**47], [0, 0])}, b"")
def test_any_json_header_is_read_or_rejected(header: object, data: bytes) -> None:
    """Whatever JSON stands where the header should, reading gives tensors or a reason, never another exception."""
    assert_read_or_rejected(with_header(header, data))


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_any_bytes_are_read_or_rejected(data: bytes) -> None:
    """Whatever bytes are in a file, reading gives tensors or a reason, never another exception."""
    assert_read_or_rejected(data)
    assert_read_or_rejected(with_header(data))


@settings(deadline=None)
@given(st.data())
def test_a_damaged_header_with_a_right_digest_is_read_or_rejected(data: st.DataObject) -> None:
    """A valid file in which any few bytes were exchanged gives tensors or a reason, never another exception."""
    bent = bytearray(DATA)
    for _ in range(data.draw(st.integers(1, 3))):
        bent[data.draw(st.integers(0, len(DATA) - 1))] = data.draw(st.integers(0, 255))
    assert_read_or_rejected(bytes(bent))


# -- a module's state ----------------------------------------------------------------------------------------------


def test_a_tied_weight_is_named_once() -> None:
    """A tensor that has two names goes by the first; non-persistent buffers do not go at all."""
    assert list(named_tensors(Everything())) == [
        "steps",
        "encode.weight",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    ]


@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "submodule"])
def test_compiled_modules_have_the_names_of_plain_ones(whole: bool) -> None:
    """What `torch.compile` puts into names is not in the file."""
    plain = Everything()
    expected = list(named_tensors(plain))
    if whole:
        compiled = torch.compile(plain, backend="eager")
        assert isinstance(compiled, nn.Module)
        assert list(named_tensors(compiled)) == expected
    else:
        plain.norm = torch.compile(plain.norm, backend="eager")  # type: ignore[assignment]
        assert list(named_tensors(plain)) == expected


def test_named_tensors_are_the_modules_own() -> None:
    """Nothing is copied: filling a named tensor fills the module, and no gradient history comes along."""
    module = nn.Linear(2, 2)
    named = named_tensors(module)
    assert not named["weight"].requires_grad
    named["weight"].fill_(3.0)
    assert module.weight.tolist() == [[3, 3], [3, 3]]


class Extra(nn.Module):
    """A module with state that is not a tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}


def test_state_that_is_no_tensor_is_refused() -> None:
    """State that a tensor file cannot hold is refused by name rather than left out or pickled."""
    with pytest.raises(EmaswapError, match=r"'0\._extra_state' is a dict, not a tensor"):
        named_tensors(nn.Sequential(Extra()))


# -- finiteness ----------------------------------------------------------------------------------------------------

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
floats = pytest.mark.parametrize("dtype", FLOATS, ids=map(dtype_name, FLOATS))


@floats
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4)], ids=["one number", "vector", "matrix"])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype, value: float, shape: tuple[int, ...]) -> None:
    """A single NaN or infinity anywhere in a tensor is found, and the tensor is named."""
    bad = torch.zeros(shape, dtype=dtype)
    bad.view(-1)[-1] = value
    assert not_finite({"good": torch.ones(3, dtype=dtype), "bad": bad}) == ["bad"]


@floats
def test_the_largest_and_smallest_numbers_are_finite(dtype: torch.dtype) -> None:
    """The ends of a dtype's range, subnormal numbers, zeros of both signs and no numbers at all are finite."""
    info = torch.finfo(dtype)
    ends = torch.tensor([info.max, info.min, info.tiny, info.smallest_normal / 4, 0.0, -0.0], dtype=dtype)
    assert not_finite({"ends": ends, "none": ends[:0], "strided": ends[::2], "expanded": ends[:1].expand(3, 1)}) == []


def test_integers_are_always_finite() -> None:
    """Integers and bools have no value that is not finite, whatever their bits."""
    whole = [dtype for dtype in DTYPES.values() if not (dtype.is_floating_point or dtype.is_complex)]
    assert not_finite({dtype_name(dtype): random_tensor(dtype, (16,)) for dtype in whole}) == []


@settings(deadline=None)
@given(st.sampled_from(FLOATS), st.integers(0, 10_000))
def test_finiteness_is_torchs_own(dtype: torch.dtype, seed: int) -> None:
    """For any bits the answer is that of `torch.isfinite`."""
    tensor = random_tensor(dtype, (2,), seed)
    assert not_finite({"x": tensor}) == ([] if torch.isfinite(tensor).all() else ["x"])
