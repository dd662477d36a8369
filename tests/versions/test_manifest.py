"""The manifest: the frozen, validated description of one version."""

import json
import math
import time
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from emaswap import Architecture, BadVersion, EmaswapError, Manifest, Pin, Reason, Signature, TensorField, __version__
from emaswap.files.digest import digest_of
from emaswap.versions.manifest import (
    FORMAT,
    MAX_MANIFEST_BYTES,
    EmaInfo,
    ProbeInfo,
    ScheduleInfo,
    TensorInfo,
    TrainingInfo,
    WeightsInfo,
)
from emaswap.versions.proof import check_size
from tests.models import Everything

text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
sizes = st.integers(0, 1 << 48)
digests = st.binary(max_size=8).map(digest_of) | st.binary(max_size=8).map(lambda data: digest_of(data, "sha256"))
numbers = st.floats(allow_nan=False, allow_infinity=False)
arguments = st.dictionaries(
    text,
    st.recursive(
        st.none() | st.booleans() | st.integers() | numbers | text,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)
fields = st.builds(
    TensorField,
    name=text,
    dtype=st.sampled_from(["float32", "int64", "bool"]),
    shape=st.lists(st.none() | st.integers(1, 1000), max_size=4).map(tuple),
)
zones = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
manifests = st.builds(
    Manifest,
    model=text,
    version=st.integers(1, 10**15),
    term=st.integers(1, 10**9),
    run=text,
    parent=st.none() | digests,
    created_at=st.datetimes(min_value=datetime(1971, 1, 1), max_value=datetime(2200, 1, 1), timezones=zones),  # noqa: DTZ001
    weights=st.builds(
        WeightsInfo,
        digest=digests,
        size=sizes,
        tensors=st.dictionaries(
            text,
            st.builds(TensorInfo, dtype=text, shape=st.lists(st.integers(0, 4096), max_size=4).map(tuple)),
            max_size=3,
        ),
    ),
    architecture=st.builds(Architecture, factory=st.just("package.module:Net"), arguments=arguments),
    signature=st.builds(
        Signature,
        inputs=st.lists(fields, min_size=1, max_size=3, unique_by=lambda field: field.name).map(tuple),
        outputs=st.lists(fields, min_size=1, max_size=3, unique_by=lambda field: field.name).map(tuple),
    ),
    ema=st.builds(
        EmaInfo,
        schedule=st.none() | st.builds(ScheduleInfo, name=text, tau=numbers),
        updates=st.integers(0, 10**15),
        window=st.floats(),
    ),
    training=st.builds(
        TrainingInfo, step=st.integers(0, 10**15), metrics=st.dictionaries(text, st.none() | st.floats(), max_size=3)
    ),
    probe=st.builds(ProbeInfo, digest=digests, size=sizes, rtol=st.floats(0, 1), atol=st.floats(0, 1e300)),
)

MANIFEST = Manifest(
    model="digits",
    version=42,
    term=3,
    run="a run",
    parent=digest_of(b"the manifest before"),
    created_at=datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=UTC),
    weights=WeightsInfo(digest=digest_of(b"weights"), size=7, tensors={"w": TensorInfo(dtype="float32", shape=(2, 3))}),
    architecture=Architecture(factory="package.module:Net", arguments={"width": 32, "bias": None}),
    signature=Signature(inputs=(TensorField(name="x", shape=(None, 3)),), outputs=(TensorField(name="y"),)),
    ema=EmaInfo.model_validate(
        {"schedule": {"name": "exponential_ramp", "decay": 0.9999, "tau": 2000.0}, "updates": 5}
    ),
    training=TrainingInfo(step=1000, metrics={"accuracy": 0.97}),
    probe=ProbeInfo(digest=digest_of(b"probe"), size=5, rtol=1e-4, atol=1e-5),
)


def bent(*path: str, value: object) -> bytes:
    """The encoded manifest with another value at a path."""
    raw = json.loads(MANIFEST.encode())
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(raw).encode()


def reason_for(data: bytes) -> Reason:
    """Why decoding these bytes is refused."""
    with pytest.raises(BadVersion) as raised:
        Manifest.decode(data)
    return raised.value.reason


# -- round trips ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(manifests)
def test_what_is_encoded_is_decoded(manifest: Manifest) -> None:
    """A manifest comes back equal, and encodes to the same bytes again."""
    data = manifest.encode()
    assert Manifest.decode(data) == manifest
    assert Manifest.decode(data).encode() == data


def test_a_manifest_is_readable_json() -> None:
    """People read manifests, too: JSON of many lines, ending in a newline, with the fields that the design names."""
    data = MANIFEST.encode()
    raw = json.loads(data)
    assert data.endswith(b"}\n")
    assert data.count(b"\n") > 20
    assert raw["format"] == FORMAT
    assert raw["release"] == __version__
    assert raw["created_at"] == "2024-02-29T12:00:00.123456Z"
    assert raw["signature"]["inputs"][0]["shape"] == [None, 3]
    assert raw["ema"]["schedule"]["tau"] == 2000.0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=["inf", "-inf", "nan"])
def test_an_argument_that_json_cannot_carry_is_not_lost(value: float) -> None:
    """A factory's argument comes back as it was, or is refused at once: it never turns into null on the way."""
    try:
        architecture = Architecture.of(nn.Linear, fill=value)
    except EmaswapError:
        return
    manifest = MANIFEST.model_copy(update={"architecture": architecture})
    assert repr(Manifest.decode(manifest.encode()).architecture.arguments["fill"]) == repr(value)


# -- what is forgiven ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(("new",), id="manifest"),
        pytest.param(("weights", "new"), id="weights"),
        pytest.param(("weights", "tensors", "w", "new"), id="tensor"),
        pytest.param(("architecture", "new"), id="architecture"),
        pytest.param(("signature", "new"), id="signature"),
        pytest.param(("training", "new"), id="training"),
        pytest.param(("probe", "new"), id="probe"),
    ],
)
def test_unknown_fields_are_ignored(path: tuple[str, ...]) -> None:
    """What a later release adds at any level is no reason to refuse a version."""
    assert Manifest.decode(bent(*path, value={"a": [1]})) == MANIFEST


def test_a_schedules_own_parameters_are_kept() -> None:
    """How the average came about is told in full, whatever its schedule's parameters are called."""
    found = Manifest.decode(bent("ema", "schedule", "half_life", value=12.5))
    assert found.ema.schedule is not None
    assert found.ema.schedule.model_dump()["half_life"] == 12.5


@pytest.mark.parametrize("field", ["release", "parent", "ema", "training"])
def test_a_field_with_a_default_may_be_left_out(field: str) -> None:
    """A manifest is whole without what has a default."""
    raw = json.loads(MANIFEST.encode())
    del raw[field]
    assert Manifest.decode(json.dumps(raw).encode()).version == 42


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None], ids=["nan", "inf", "-inf", "none"])
def test_a_metric_that_is_not_finite_is_null(value: float | None) -> None:
    """JSON has no NaN: a metric that is not finite is kept as null, when made and when read."""
    training = TrainingInfo(metrics={"loss": value, "accuracy": 0.5})
    assert training.metrics == {"loss": None, "accuracy": 0.5}
    manifest = MANIFEST.model_copy(update={"training": training})
    assert json.loads(manifest.encode())["training"]["metrics"] == {"loss": None, "accuracy": 0.5}
    assert Manifest.decode(bent("training", "metrics", "loss", value=value)).training.metrics["loss"] is None


# -- what is refused -----------------------------------------------------------------------------------------------


def test_a_later_format_is_refused_by_the_release_that_reads_it() -> None:
    """The message names the release that wrote the version, and this one, and what to do."""
    raw = json.loads(MANIFEST.encode()) | {"format": FORMAT + 1, "release": "99.1", "weights": "in another shape"}
    with pytest.raises(BadVersion, match=rf"by emaswap 99\.1; this is emaswap {__version__}.*upgrade") as raised:
        Manifest.decode(json.dumps(raw).encode())
    assert raised.value.reason == Reason.FORMAT_UNKNOWN


@pytest.mark.parametrize(
    "format_",
    [
        pytest.param(FORMAT + 1, id="the next"),
        pytest.param(10**30, id="a giant"),
        pytest.param(float(FORMAT + 1), id="the next as a float"),
        pytest.param(str(FORMAT + 1), id="the next as a text"),
        pytest.param(0, id="zero"),
        pytest.param(-1, id="negative"),
        pytest.param("one", id="a word"),
        pytest.param(None, id="null"),
        pytest.param([1], id="a list"),
    ],
)
def test_no_other_format_is_read(format_: object) -> None:
    """However a format is spelled, only those that this release knows are read."""
    assert reason_for(bent("format", value=format_)) in (Reason.FORMAT_UNKNOWN, Reason.MANIFEST_INVALID)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\0" * 100, id="NULs"),
        pytest.param(MANIFEST.encode() + b"\0", id="NUL after it"),
        pytest.param(MANIFEST.encode()[:-3], id="cut off"),
        pytest.param(MANIFEST.encode().replace(b"digits", b"\xff\xfe"), id="not UTF-8"),
        pytest.param(MANIFEST.encode().replace(b"digits", b"\\ud800"), id="half a character"),
        pytest.param(MANIFEST.encode().replace(b"digits", b"\xe2\x82"), id="half a character of UTF-8"),
        pytest.param(MANIFEST.encode().replace(b"digits", b"\xc0\x80"), id="a NUL in two bytes"),
        pytest.param(MANIFEST.encode().replace(b"digits", b"\0"), id="a NUL in a name"),
        pytest.param(MANIFEST.encode().decode().encode("utf-16"), id="UTF-16"),
        pytest.param(b"\xef\xbb\xbf" + MANIFEST.encode(), id="a byte order mark"),
        pytest.param(MANIFEST.encode() + MANIFEST.encode(), id="two manifests"),
        pytest.param(MANIFEST.encode().replace(b"{", b'{"version": 41,', 1), id="a field twice"),
        pytest.param(MANIFEST.encode().replace(b'"width": 32', b'"width": 32, "width": 33'), id="an argument twice"),
        pytest.param(MANIFEST.encode().replace(b"{", b'{"format": 2,', 1), id="two formats"),
        pytest.param(MANIFEST.encode().replace(b": 42,", b": 1e400,"), id="a version of 1e400"),
        pytest.param(MANIFEST.encode().replace(b": 42,", b": 1" + b"0" * 400 + b","), id="a version of 10**400"),
        pytest.param(MANIFEST.encode().replace(b": 42,", b": NaN,"), id="a version that is NaN"),
        pytest.param(MANIFEST.encode().replace(b": 32,", b": -Infinity,"), id="an infinite argument"),
        pytest.param(
            MANIFEST.encode().replace(b": 32,", b": 1" + b"0" * 5000 + b","), id="an argument of 5,000 digits"
        ),
        pytest.param(b"not JSON", id="not JSON"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"null", id="null"),
        pytest.param(b"42", id="a number"),
        pytest.param(b"{}", id="nothing in it"),
        pytest.param(b"[" * 100_000, id="deep lists"),
        pytest.param(b'{"a":' * 100_000, id="deep objects"),
        pytest.param(b'{"format": ' + b"9" * 10_000 + b"}", id="a number of 10,000 digits"),
        pytest.param(bent("architecture", "arguments", value=json.loads("[" * 100 + "]" * 100)), id="list for object"),
    ],
)
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    """What is not JSON of a manifest's form is invalid, however it is broken."""
    assert reason_for(data) == Reason.MANIFEST_INVALID


def test_arguments_may_not_nest_without_end() -> None:
    """Arguments nested thousands deep are refused, and do not exhaust the stack."""
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    data = MANIFEST.encode().replace(b'"width": 32', f'"width": {deep}'.encode())
    assert data != MANIFEST.encode()
    assert reason_for(data) == Reason.MANIFEST_INVALID


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param(("model",), "", id="an empty model name"),
        pytest.param(("model",), "x" * 201, id="a long model name"),
        pytest.param(("model",), 7, id="a model name that is a number"),
        pytest.param(("version",), 0, id="version 0"),
        pytest.param(("version",), -1, id="a negative version"),
        pytest.param(("version",), 10**15 + 1, id="a giant version"),
        pytest.param(("version",), 1.5, id="half a version"),
        pytest.param(("version",), [42], id="a list for a version"),
        pytest.param(("version",), None, id="no version"),
        pytest.param(("term",), 0, id="term 0"),
        pytest.param(("run",), None, id="no run"),
        pytest.param(("parent",), "a1b2", id="a parent that is no digest"),
        pytest.param(("created_at",), "yesterday", id="a time that is none"),
        pytest.param(("created_at",), "2024-02-29T12:00:00", id="a time of no zone"),
        pytest.param(("weights",), None, id="no weights"),
        pytest.param(("weights", "digest"), "md5:00", id="a digest of another kind"),
        pytest.param(("weights", "digest"), f"blake3:../{'0' * 61}", id="a digest that is a path"),
        pytest.param(("weights", "size"), -1, id="a negative size"),
        pytest.param(("weights", "size"), 2**48 + 1, id="a giant size"),
        pytest.param(("weights", "tensors", "w", "shape"), [-1], id="a negative shape"),
        pytest.param(("weights", "tensors", "w", "shape"), [2**49], id="a giant shape"),
        pytest.param(("weights", "tensors", "w", "shape"), [2**24, 2**25], id="more numbers than can be counted"),
        pytest.param(("weights", "tensors", "w", "shape"), [2**48, 2**48, 0], id="a giant but for a size of 0"),
        pytest.param(("weights", "tensors", "w", "shape"), [1] * 33, id="33 dimensions"),
        pytest.param(("weights", "tensors", "w", "dtype"), "f" * 33, id="a long dtype"),
        pytest.param(("release",), "1" * 201, id="a long release"),
        pytest.param(("run",), "r" * 201, id="a long run"),
        pytest.param(("weights", "tensors"), [], id="tensors without names"),
        pytest.param(("architecture", "factory"), "package.module", id="a module for a factory"),
        pytest.param(("architecture", "factory"), "package/module:Net", id="a path for a factory"),
        pytest.param(("architecture", "factory"), ".module:Net", id="a relative factory"),
        pytest.param(("architecture", "factory"), "package.module:Net.of", id="an attribute for a factory"),
        pytest.param(("architecture", "factory"), "package.module:Net\n", id="a factory and a newline"),
        pytest.param(("architecture", "factory"), "package.module:Net\0", id="a factory and a NUL"),
        pytest.param(("architecture", "factory"), f"{'p' * 500}:Net", id="a long factory"),
        pytest.param(("signature", "inputs"), [], id="no inputs"),
        pytest.param(("signature", "inputs"), [{"name": "x"}, {"name": "x"}], id="inputs of one name"),
        pytest.param(("training", "metrics"), {"a": "b"}, id="a metric that is a word"),
        pytest.param(("probe", "rtol"), -1e-9, id="a negative rtol"),
        pytest.param(("probe", "rtol"), 1.1, id="an rtol above 1"),
        pytest.param(("probe", "rtol"), math.nan, id="an rtol that is NaN"),
        pytest.param(("probe", "atol"), -1e-9, id="a negative atol"),
        pytest.param(("probe", "atol"), math.nan, id="an atol that is NaN"),
        pytest.param(("probe", "atol"), math.inf, id="an infinite atol"),
    ],
)
def test_a_value_out_of_range_is_refused_by_the_name_of_its_field(path: tuple[str, ...], value: object) -> None:
    """A value of a wrong type or out of range is invalid, and the message names the field."""
    with pytest.raises(BadVersion) as raised:
        Manifest.decode(bent(*path, value=value))
    assert raised.value.reason == Reason.MANIFEST_INVALID
    assert path[0] in raised.value.detail


def test_many_problems_make_a_short_message() -> None:
    """A manifest that is wrong everywhere is refused in a few words and a count."""
    tensors: dict[str, object] = {f"t{i}": {} for i in range(100)}
    with pytest.raises(BadVersion, match="and 195 more") as raised:
        Manifest.decode(bent("weights", "tensors", value=tensors))
    assert len(raised.value.detail) < 1000


FULL = MAX_MANIFEST_BYTES - 2000


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b" " * FULL, "manifest_invalid", id="spaces"),
        pytest.param(b"[" + b"[]," * (FULL // 3) + b"0]", "manifest_invalid", id="lists"),
        pytest.param(b"[" * FULL, "manifest_invalid", id="deep lists"),
        pytest.param(b"9" * FULL, "manifest_invalid", id="a number"),
        pytest.param(b'{"version": "' + b"9" * FULL + b'"}', "manifest_invalid", id="a number as a text"),
        pytest.param(
            bent("weights", "tensors", "w", "shape", value=[2**48] * 200_000), "manifest_invalid", id="a shape"
        ),
        pytest.param(bent("weights", "tensors", value={"x" * FULL: {}}), "manifest_invalid", id="a name"),
        pytest.param(bent("training", "metrics", value={"x" * FULL: "a"}), "manifest_invalid", id="a metric"),
        pytest.param(bent("variants", value={str(i): 1 for i in range(200_000)}), "manifest_invalid", id="variants"),
        pytest.param(
            bent("weights", "tensors", value={str(i): {} for i in range(200_000)}), "manifest_invalid", id="tensors"
        ),
        pytest.param(bent("architecture", "factory", value="a." * (FULL // 2)), "manifest_invalid", id="a factory"),
        pytest.param(bent("signature", "inputs", value=[{"name": "x"}] * 200_000), "manifest_invalid", id="inputs"),
        pytest.param(
            json.dumps({"format": 2, "release": "9" * FULL}).encode(), "format_unknown", id="a later release's name"
        ),
        pytest.param(
            json.dumps({"format": 2, "release": [1] * 900_000}).encode(), "format_unknown", id="a list for a release"
        ),
        pytest.param(b'{"format": 1' + b"0" * 4000 + b"}", "format_unknown", id="a format of 4,000 digits"),
        pytest.param(b'{"format": 2, "release": "\\ud800"}', "format_unknown", id="a release that is no text"),
    ],
)
def test_the_largest_manifest_is_refused_at_once_and_in_a_few_words(data: bytes, reason: str) -> None:
    """Whatever fills a file of the largest size, refusing it takes little time, and the reason is short and is text."""
    assert len(data) <= MAX_MANIFEST_BYTES
    before_s = time.process_time()
    with pytest.raises(BadVersion) as raised:
        check_size(Manifest.decode(data))
    assert time.process_time() - before_s < 5
    assert raised.value.reason == reason
    assert len(raised.value.detail.encode()) < 2000


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    """Whatever bytes are in a manifest's place, decoding gives a reason, never another exception."""
    assert reason_for(data) in (Reason.MANIFEST_INVALID, Reason.FORMAT_UNKNOWN)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_manifest_is_decoded_or_refused(data: st.DataObject) -> None:
    """A manifest in which any few bytes were exchanged is decoded or refused, never another exception."""
    damaged = bytearray(MANIFEST.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        Manifest.decode(bytes(damaged))
    except BadVersion as refused:
        reason = refused.reason
    else:
        return
    assert reason in (Reason.MANIFEST_INVALID, Reason.FORMAT_UNKNOWN)


any_json: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.sampled_from(sorted(Manifest.model_fields)), any_json)
def test_any_value_of_any_field_is_decoded_or_refused(field: str, value: object) -> None:
    """Whatever JSON stands in a field, decoding gives a manifest that can be encoded, or a reason."""
    try:
        found = Manifest.decode(bent(field, value=value))
    except BadVersion as refused:
        reason = refused.reason
    else:
        assert Manifest.decode(found.encode()).encode() == found.encode()
        return
    assert reason in (Reason.MANIFEST_INVALID, Reason.FORMAT_UNKNOWN)


# -- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "field"),
    [
        pytest.param(MANIFEST, "version", id="manifest"),
        pytest.param(MANIFEST.weights, "digest", id="weights"),
        pytest.param(MANIFEST.architecture, "factory", id="architecture"),
        pytest.param(MANIFEST.ema, "updates", id="ema"),
        pytest.param(MANIFEST.training, "step", id="training"),
        pytest.param(MANIFEST.probe, "atol", id="probe"),
        pytest.param(Pin(version=1, at=datetime(2024, 1, 1, tzinfo=UTC)), "version", id="pin"),
    ],
)
def test_a_manifest_is_frozen(value: Manifest, field: str) -> None:
    """Nothing of a manifest can be assigned to."""
    with pytest.raises(ValidationError, match="frozen"):
        setattr(value, field, None)


def build_digits() -> nn.Module:
    """A factory that is a function."""
    return nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("factory", "path"),
    [
        pytest.param(Everything, "tests.models:Everything", id="class"),
        pytest.param(build_digits, "tests.versions.test_manifest:build_digits", id="function"),
    ],
)
def test_an_architecture_is_made_of_a_class_or_function(factory: object, path: str) -> None:
    """`Architecture.of` writes the import path of a factory, and its keyword arguments."""
    assert Architecture.of(factory, width=3) == Architecture(factory=path, arguments={"width": 3})


class Outer:
    """A place for a class that no import path names."""

    class Inner(nn.Module):
        """A class within a class."""


@pytest.mark.parametrize(
    "factory",
    [pytest.param(Outer.Inner, id="nested class"), pytest.param(lambda: nn.Linear(1, 1), id="lambda")],
)
def test_a_factory_that_cannot_be_imported_is_refused(factory: object) -> None:
    """What the service could never import by its path is refused when the architecture is made."""
    with pytest.raises(EmaswapError, match="move it to the top of a module"):
        Architecture.of(factory)


def test_a_pin_names_a_version() -> None:
    """A pin is a version, with a reason and a time; it has no default version."""
    pin = Pin.model_validate_json('{"version": 41, "reason": "bad recall", "at": "2024-01-01T00:00:00Z", "new": 1}')
    assert (pin.version, pin.reason) == (41, "bad recall")
    with pytest.raises(ValidationError):
        Pin.model_validate_json('{"at": "2024-01-01T00:00:00Z"}')
