"""From JSON to arrays: what fits the signature comes through exactly, everything else is refused with a reason."""

import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from emaswap import Signature, TensorField
from emaswap.versions.signature import DType
from service.refusal import Refusal
from service.serving.servable import Rows
from service.web.json_rows import parse, parse_together
from service.web.schemas import PredictRequest

MAX_ROWS = 8


def signature(*fields: TensorField) -> Signature:
    """A signature with these inputs."""
    return Signature(inputs=fields, outputs=(TensorField(name="out"),))


def x(dtype: DType = "float32", *shape: int | None) -> TensorField:
    """An input named x."""
    return TensorField(name="x", dtype=dtype, shape=shape)


def parse_json(body: object, *fields: TensorField) -> Rows:
    """Parse a body that is JSON."""
    return parse(json.dumps(body).encode(), signature(*fields), MAX_ROWS)


def refusal(body: object, *fields: TensorField) -> Refusal:
    """The refusal of a body, which is JSON unless it is bytes already."""
    with pytest.raises(Refusal) as caught:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode(), signature(*fields), MAX_ROWS)
    return caught.value


@pytest.mark.parametrize(
    ("field", "rows", "dtype"),
    [
        pytest.param(x("float32", 2), [[1, 2.5], [-3, 0]], "float32", id="float32 from numbers of both kinds"),
        pytest.param(x("float64", 1), [[0.1]], "float64", id="float64 to the last bit"),
        pytest.param(x("float16", 1), [[0.5], [65504]], "float16", id="float16 up to its largest"),
        pytest.param(x("bfloat16", 1), [[0.5]], "float32", id="bfloat16 as float32, which torch narrows"),
        pytest.param(x("int64", 2), [[2**63 - 1, -(2**63)]], "int64", id="int64 to both ends"),
        pytest.param(x("int32", 2), [[2**31 - 1, -(2**31)]], "int32", id="int32 to both ends"),
        pytest.param(x("int16", 1), [[-(2**15)]], "int16", id="int16"),
        pytest.param(x("int8", 1), [[-128]], "int8", id="int8"),
        pytest.param(x("uint8", 2), [[0, 255]], "uint8", id="uint8 to both ends"),
        pytest.param(x("bool", 2), [[True, False]], "bool", id="bool from true and false"),
        pytest.param(x("float32"), [1, 2, 3], "float32", id="rows that are single numbers"),
        pytest.param(x("bool"), [True], "bool", id="rows that are single truths"),
        pytest.param(x("float32", 2, 1, 2), [[[[1, 2]], [[3, 4]]]], "float32", id="rows of three dimensions"),
        pytest.param(x("int64", None), [[1, 2, 3]], "int64", id="rows of any size"),
        pytest.param(x("int64", None), [[], []], "int64", id="rows of no size at all"),
        pytest.param(x("float32", None, 2), [[[1, 2], [3, 4], [5, 6]]], "float32", id="one size fixed, one not"),
    ],
)
def test_rows_that_fit_come_through_exactly(field: TensorField, rows: list[Any], dtype: str) -> None:
    """The array has the field's dtype and just the values that were sent."""
    array = parse_json({"inputs": rows}, field)["x"]
    assert array.dtype == np.dtype(dtype)
    assert array.tolist() == rows


def test_one_input_may_also_be_sent_by_name() -> None:
    """Rows by name are the same as rows alone when there is one input."""
    assert parse_json({"inputs": {"x": [[1.0]]}}, x("float32", 1))["x"].tolist() == [[1.0]]


def test_several_inputs_come_in_the_order_of_the_signature() -> None:
    """Inputs by name are given to the model in its order, whatever order they were sent in."""
    fields = TensorField(name="a", dtype="int64", shape=(None,)), TensorField(name="b")
    arrays = parse_json({"inputs": {"b": [0.5, 1], "a": [[1], [2]]}}, *fields)
    assert {name: array.tolist() for name, array in arrays.items()} == {"a": [[1], [2]], "b": [0.5, 1.0]}
    assert list(arrays) == ["a", "b"]


def test_what_else_is_in_the_object_is_ignored() -> None:
    """Unknown keys beside `inputs` do no harm."""
    assert parse_json({"id": "7", "inputs": [[1]], "parameters": {"a": "b"}}, x("float32", 1))["x"].tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("field", "rows", "code", "row", "came"),
    [
        pytest.param(x("float32", 1), [[1], ["one"]], "wrong_dtype", 1, "the text 'one'", id="text"),
        pytest.param(x("float32", 1), [["1.5"]], "wrong_dtype", 0, "the text '1.5'", id="a number as text"),
        pytest.param(x("float32", 2), [[1, "1.5"]], "wrong_dtype", 0, "the text '1.5'", id="a number and a number as text"),
        pytest.param(x("int64", 1), [["7"]], "wrong_dtype", 0, "the text '7'", id="a whole number as text"),
        pytest.param(x("float32", 1), [["nan"]], "wrong_dtype", 0, "the text 'nan'", id="not a number, as text"),
        pytest.param(x("float32", 1), [["inf"]], "wrong_dtype", 0, "the text 'inf'", id="infinity as text"),
        pytest.param(x("float32", 1), [[1], [None]], "wrong_dtype", 1, "null", id="null in a row"),
        pytest.param(x("float32", 1), [[1], None], "wrong_dtype", 1, "null", id="null for a row"),
        pytest.param(x("float32", 1), [[1], [{"a": 1}]], "wrong_dtype", 1, "an object with the keys ['a']", id="an object"),
        pytest.param(x("float32"), [1, {}], "wrong_dtype", 1, "an object", id="an object for a row that is a number"),
        pytest.param(x("float32", 1), [[True]], "wrong_dtype", 0, "true", id="true for a float"),
        pytest.param(x("float32", 1), [[1.5], [True]], "wrong_dtype", 1, "true", id="true for a float, after a number"),
        pytest.param(x("int64", 1), [[False]], "wrong_dtype", 0, "false", id="false for a whole number"),
        pytest.param(x("int64", 1), [[1], [2], [False]], "wrong_dtype", 2, "false", id="false after whole numbers"),
        pytest.param(x("int64", 1), [[0.5]], "wrong_dtype", 0, "number", id="a fraction for a whole number"),
        pytest.param(x("int64", 1), [[1], [2], [2.5]], "wrong_dtype", 2, "number", id="a fraction after whole numbers"),
        pytest.param(x("bool", 1), [[1]], "wrong_dtype", 0, "number", id="one for true"),
        pytest.param(x("bool", 1), [[True], [1]], "wrong_dtype", 1, "number", id="one after true"),
        pytest.param(x("bool", 1), [[0.5]], "wrong_dtype", 0, "number", id="a fraction for true"),
        pytest.param(x("uint8", 1), [[255], [256]], "wrong_dtype", 1, "outside 0..255", id="above uint8"),
        pytest.param(x("uint8", 1), [[0], [-1]], "wrong_dtype", 1, "outside 0..255", id="below uint8"),
        pytest.param(x("int32", 1), [[2**31]], "wrong_dtype", 0, "outside -2147483648..2147483647", id="above int32"),
        pytest.param(x("int64", 1), [[0], [2**63]], "wrong_dtype", 1, "outside", id="above int64"),
        pytest.param(x("int64", 1), [[-1], [2**63]], "wrong_dtype", 1, "", id="above int64, after a negative one"),
        pytest.param(x("int64", 1), [[2**64]], "wrong_dtype", 0, "", id="above every whole number"),
        pytest.param(x("float32", 1), [[0], [1e39]], "not_finite", 1, "too large for float32", id="above float32"),
        pytest.param(x("float32", 1), [[-1e39]], "not_finite", 0, "too large for float32", id="below float32"),
        pytest.param(x("float16", 1), [[70000]], "not_finite", 0, "too large for float16", id="above float16"),
        pytest.param(x("bfloat16", 1), [[0], [3.4e38]], "not_finite", 1, "too large for bfloat16", id="above bfloat16"),
        pytest.param(x("float32", 2), [[1, 2], [3]], "wrong_shape", 1, "(1,)", id="a row that is too short"),
        pytest.param(x("float32", 2), [[1, 2, 3]], "wrong_shape", 0, "(3,)", id="a row that is too long"),
        pytest.param(x("float32", 2), [[1, 2], []], "wrong_shape", 1, "(0,)", id="a row that is empty"),
        pytest.param(x("float32", 2), [1, 2], "wrong_shape", 0, "()", id="a row instead of rows"),
        pytest.param(x("float32"), [[1]], "wrong_shape", 0, "(1,)", id="rows where numbers were expected"),
        pytest.param(x("float32", 2), [[1, [2]]], "wrong_shape", 0, "ragged", id="a row that is ragged in itself"),
        pytest.param(x("float32", 2), [[[1, 2]]], "wrong_shape", 0, "(1, 2)", id="one level too deep"),
        pytest.param(x("int64", None), [[1, 2], [3]], "wrong_shape", 1, "(1,)", id="rows of different sizes"),
        pytest.param(x("float32", None, 2), [[[1, 2]], [[1, 2, 3]]], "wrong_shape", 1, "(1, 3)", id="the fixed size differs"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_is_named(field: TensorField, rows: list[Any], code: str, row: int, came: str) -> None:
    """A refusal names the input, the first row that does not fit, what was expected of it, and what came."""
    refused = refusal({"inputs": rows}, field)
    assert refused.code == code
    assert f"input 'x', row {row}: " in refused.detail
    assert str(field) in refused.detail or field.dtype in refused.detail or "rows before it" in refused.detail
    assert came in refused.detail


@pytest.mark.parametrize(
    ("rows", "came"),
    [
        pytest.param([], "a list of 0", id="no row"),
        pytest.param(None, "null", id="null"),
        pytest.param(5, "the number 5", id="a number"),
        pytest.param("rows", "the text 'rows'", id="text"),
        pytest.param(True, "true", id="true"),
    ],
)
def test_what_is_no_list_of_rows_is_named(rows: object, came: str) -> None:
    """Whatever stands where rows should, the refusal says what it is."""
    refused = refusal({"inputs": rows}, x("float32", 1))
    assert refused.code == "wrong_shape"
    assert refused.detail == f"input 'x': expected a list of at least one row, got {came}"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        pytest.param(b"", "invalid_json", id="nothing"),
        pytest.param(b"{", "invalid_json", id="half an object"),
        pytest.param(b'{"inputs": [[1]]} x', "invalid_json", id="more after the end"),
        pytest.param(b"\xff\xfe{}", "invalid_json", id="bytes that are no UTF-8"),
        pytest.param(b'{"inputs": [[NaN]]}', "invalid_json", id="NaN, which JSON has not"),
        pytest.param(b'{"inputs": [[Infinity]]}', "invalid_json", id="Infinity, which JSON has not"),
        pytest.param(b'{"inputs": [["\\ud800"]]}', "invalid_json", id="half a surrogate pair"),
        pytest.param(b"[" * 60_000, "invalid_json", id="brackets without an end"),
        pytest.param(b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}", "invalid_json", id="thousands of brackets"),
        pytest.param(b'{"inputs": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", "invalid_json", id="thousands of braces"),
        pytest.param(b'{"inputs": ' + b"[" * 900 + b"1" + b"]" * 900 + b"}", "wrong_shape", id="hundreds of brackets"),
        pytest.param(b'{"inputs": [' + b"[" * 900 + b"]" * 900 + b"]}", "wrong_shape", id="hundreds of empty brackets"),
        pytest.param(b"[[1]]", "invalid_inputs", id="rows alone"),
        pytest.param(b"null", "invalid_inputs", id="null"),
        pytest.param(b'"inputs"', "invalid_inputs", id="text"),
        pytest.param(b"{}", "invalid_inputs", id="an empty object"),
        pytest.param(b'{"instances": [[1]]}', "invalid_inputs", id="another key"),
        pytest.param(b'{"inputs": {}}', "invalid_inputs", id="no input by name"),
        pytest.param(b'{"inputs": {"y": [[1]]}}', "invalid_inputs", id="an input of another name"),
        pytest.param(b'{"inputs": {"x": [[1]], "y": [[1]]}}', "invalid_inputs", id="one input too many"),
        pytest.param(b'{"inputs": [[1e39]]}', "not_finite", id="a number too large for the dtype"),
    ],
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(body: bytes, code: str) -> None:
    """What cannot be read as a request gets a code, and a text that is not empty and not long."""
    refused = refusal(body, x("float32", 1))
    assert refused.code == code
    assert 0 < len(refused.detail) < 1000


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1" * 400])
@pytest.mark.parametrize("dtype", ["float64", "float32", "int64", "bool"])
def test_a_number_beyond_every_dtype_is_refused(number: str, dtype: DType) -> None:
    """A number that not even float64 holds never arrives as infinity."""
    refused = refusal(b'{"inputs": [[%s]]}' % number.encode(), x(dtype, 1))
    assert refused.code in ("invalid_json", "not_finite", "wrong_dtype")


def test_names_that_are_missing_or_too_many_are_told() -> None:
    """The refusal lists the inputs that the model has and those that came."""
    fields = TensorField(name="tokens", dtype="int64", shape=(None,)), TensorField(name="bias")
    for inputs in ({"tokens": [[1]]}, {"tokens": [[1]], "bias": [1], "more": [1]}, {}):
        refused = refusal({"inputs": inputs}, *fields)
        assert refused.code == "invalid_inputs"
        assert refused.detail == f"expected the inputs ['tokens', 'bias'], got {sorted(inputs)}"


def test_several_inputs_cannot_be_sent_without_names() -> None:
    """Rows alone do not say which of several inputs they are."""
    refused = refusal({"inputs": [[1]]}, TensorField(name="a"), TensorField(name="b"))
    assert refused.code == "invalid_inputs"
    assert "by name: ['a', 'b']" in refused.detail


def test_inputs_must_have_as_many_rows_as_each_other() -> None:
    """Different numbers of rows are refused, and told by input."""
    refused = refusal({"inputs": {"a": [1, 2], "b": [1]}}, TensorField(name="a"), TensorField(name="b"))
    assert refused.code == "wrong_shape"
    assert "{'a': 2, 'b': 1}" in refused.detail


def test_the_input_that_does_not_fit_is_named() -> None:
    """Of several inputs, the refusal names the one at fault."""
    refused = refusal({"inputs": {"a": [1, 2], "b": [1, "2"]}}, TensorField(name="a"), TensorField(name="b"))
    assert "input 'b', row 1" in refused.detail


def test_as_many_rows_as_allowed_are_taken_and_no_more() -> None:
    """The limit itself is allowed; one more row is refused with the limit and the number that came."""
    assert len(parse_json({"inputs": [1] * MAX_ROWS}, x())["x"]) == MAX_ROWS
    refused = refusal({"inputs": [1] * (MAX_ROWS + 1)}, x())
    assert refused.code == "too_many_rows"
    assert f"at most {MAX_ROWS} rows" in refused.detail
    assert f"got {MAX_ROWS + 1}" in refused.detail


def test_rows_are_counted_before_they_are_looked_at() -> None:
    """Far too many rows cost no look at each of them, even if the last one would not fit."""
    refused = refusal(b'{"inputs": [' + b"1," * 100_000 + b"null]}", x())
    assert refused.code == "too_many_rows"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"[" * 8_000_000, "wrong_shape"),
        (b'{"inputs": [' + b"[]," * 2_000_000 + b"[]]}", "wrong_shape"),
        (b'{"inputs": [' + b"{}," * 2_000_000 + b"{}]}", "wrong_shape"),
        (b'{"inputs": [[' + b"0," * 4_000_000 + b"0]]}", "wrong_shape"),
        (b'{"inputs": [[' + b'"",' * 2_000_000 + b'""]]}', "wrong_dtype"),
        (b"{" + b'"a":0,' * 1_000_000 + b'"a":0}', "wrong_dtype"),
    ],
    ids=["brackets", "empty rows", "objects", "numbers", "texts", "keys"],
)
def test_what_no_request_can_have_is_refused_without_being_parsed(body: bytes, code: str) -> None:
    """Eight megabytes of something else than numbers take no memory, and a few milliseconds."""
    tracemalloc.start()
    try:
        refused = refusal(body, x("float32", 4))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.code == code
    assert peak_bytes < 1 << 20


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([b'"' + b"a" * 10_000 + b'"', *[b"1"] * 10_000], id="one long text and many numbers"),
        pytest.param([*[b"1"] * 10_000, b'"' + b"a" * 10_000 + b'"'], id="many numbers and one long text"),
        pytest.param([b'"' + b"a" * 2_000_000 + b'"', *[b'""'] * 300_000], id="one long text and very many short ones"),
        pytest.param([b'"a"'] * 300_000, id="very many short texts"),
    ],
)
@pytest.mark.parametrize("several_rows", [False, True], ids=["in a row", "as rows"])
def test_text_costs_no_more_memory_than_the_body_is_worth(values: list[bytes], several_rows: bool) -> None:
    """A body of a few megabytes takes tens of megabytes to refuse, not the longest text's length for every value."""
    body = b'{"inputs": [%s]}' % (b",".join(values) if several_rows else b"[%s]" % b",".join(values))
    tracemalloc.start()
    try:
        with pytest.raises(Refusal) as caught:
            parse(body, signature(x("float32") if several_rows else x("float32", None)), 1_000_000)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.code == "wrong_dtype"
    assert "the text 'a" in caught.value.detail
    assert peak_bytes < 64 << 20


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"inputs": [["a" * 100_000]]}, id="a long text"),
        pytest.param({"inputs": {"k" * 100_000: [[1]]}}, id="a long name of an input"),
        pytest.param({"k" * 100_000: 1}, id="a long key"),
        pytest.param({"inputs": [[{"k" * 100_000: 1}]]}, id="a long key of an object in a row"),
        pytest.param({str(number): 1 for number in range(10_000)}, id="very many keys"),
        pytest.param({"inputs": {str(number): [1] for number in range(10_000)}}, id="very many inputs"),
    ],
)
def test_a_refusal_is_short_whatever_came(body: object) -> None:
    """A refusal does not send back all that it was sent."""
    assert len(refusal(body, x("float32", 1)).detail) < 2000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["x", "a", "b", ""]), inner, max_size=3)
    ),
    max_leaves=12,
)
cells = st.integers(-(2**65), 2**65) | st.floats(allow_nan=False) | st.booleans() | st.none() | st.text(max_size=3)
nearly_rows = st.lists(st.lists(cells, min_size=1, max_size=3), min_size=1, max_size=10) | st.lists(cells, max_size=10)
bodies = st.one_of(
    st.binary(max_size=60),
    json_values.map(lambda value: json.dumps(value).encode()),
    (json_values | nearly_rows | st.dictionaries(st.sampled_from(["x", "y"]), nearly_rows)).map(
        lambda value: json.dumps({"inputs": value}).encode()
    ),
)
dtypes = st.sampled_from([*DType.__args__])  # type: ignore[attr-defined]
shapes = st.lists(st.none() | st.integers(0, 3), max_size=2).map(tuple)
signatures = st.one_of(
    st.builds(lambda dtype, shape: signature(TensorField(name="x", dtype=dtype, shape=shape)), dtypes, shapes),
    st.builds(
        lambda dtype, other: signature(TensorField(name="x", dtype=dtype), TensorField(name="y", dtype=other)),
        dtypes,
        dtypes,
    ),
)


@given(bodies, signatures)
def test_any_body_gives_arrays_that_fit_or_a_refusal(body: bytes, signature: Signature) -> None:
    """Whatever is sent, either every array fits its field and is finite in the model's own dtype, or it is refused."""
    try:
        arrays = parse(body, signature, MAX_ROWS)
    except Refusal:
        return
    assert list(arrays) == [field.name for field in signature.inputs]
    assert len({len(array) for array in arrays.values()}) == 1
    for field in signature.inputs:
        array = arrays[field.name]
        assert 1 <= len(array) <= MAX_ROWS
        assert field.accepts(array.shape[1:])
        tensor = torch.from_numpy(array).to(field.torch_dtype)
        assert field.dtype == "bfloat16" or torch.from_numpy(array).dtype == field.torch_dtype
        assert bool(tensor.isfinite().all())


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=MAX_ROWS))
def test_every_float32_comes_through_to_the_last_bit(values: list[float]) -> None:
    """A float32 written as JSON arrives as the very same float32."""
    assert parse_json({"inputs": values}, x("float32"))["x"].tolist() == values


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=MAX_ROWS))
def test_every_int64_comes_through_exactly(values: list[int]) -> None:
    """No whole number takes a detour over floating point."""
    assert parse_json({"inputs": values}, x("int64"))["x"].tolist() == values


def _fits(value: object) -> bool:
    """Whether a request is two finite numbers of float32 in each of one to eight rows, as the words of docs/http.md say it."""
    rows = value.get("inputs") if isinstance(value, dict) else None
    rows = rows["x"] if isinstance(rows, dict) and list(rows) == ["x"] else rows
    return (
        isinstance(rows, list)
        and 1 <= len(rows) <= MAX_ROWS
        and all(isinstance(row, list) and len(row) == 2 for row in rows)
        and all(
            isinstance(cell, (int, float)) and not isinstance(cell, bool) and abs(cell) < 3.4e38
            for row in rows
            for cell in row
        )
    )


@given(
    bodies
    | st.lists(st.lists(cells, min_size=2, max_size=2), max_size=9).map(lambda rows: b'{"inputs": %b}' % _json(rows))
)
def test_what_is_taken_is_what_the_schema_and_the_signature_allow(body: bytes) -> None:
    """The schema is written in pydantic, the parser is not: what one refuses the other does, and what fits both is taken."""
    try:
        taken = parse(body, signature(x("float32", 2)), MAX_ROWS)
    except Refusal:
        taken = None
    try:
        PredictRequest.model_validate_json(body)
        allowed = True
    except ValidationError:
        allowed = False
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = None
    assert allowed or taken is None
    assert (taken is not None) == (allowed and _fits(value)) or any(
        isinstance(cell, (int, float)) and 3.4e38 <= abs(cell) < 3.5e38 for cell in _numbers(value)
    )


@given(st.lists(nearly_rows.map(lambda rows: b'{"inputs": %b}' % _json(rows)), min_size=1, max_size=4))
def test_bodies_that_are_parsed_together_come_out_as_each_by_itself(together: list[bytes]) -> None:
    """What arrived in one turn is parsed at once where all of it is right, and gives the same arrays."""
    one = signature(x("float32", None))
    found = parse_together(together, one, MAX_ROWS)
    if found is None:
        return
    for body, (arrays, rows) in zip(together, found, strict=True):
        alone = parse(body, one, MAX_ROWS)
        assert rows == len(alone["x"])
        assert np.array_equal(arrays["x"], alone["x"])
        assert arrays["x"].dtype == alone["x"].dtype


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _numbers(value: object) -> Iterator[object]:
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _numbers(each)
    else:
        yield value
