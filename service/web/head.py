"""What the head of a request for a prediction says: how long its body is, how its rows are written, what it demands."""

from collections.abc import Iterable
from dataclasses import dataclass

from service.refusal import Code, Refusal
from service.web import open_inference
from service.web.binary_rows import BareRows, NpyRows
from service.web.dialect import Dialect
from service.web.json_rows import JsonRows
from service.web.token import Token

_MAX_DIGITS = 15
_MAX_TIMEOUT_MS = 86_400_000


JSON, BARE, NPY = JsonRows(), BareRows(), NpyRows()
_BY_KIND: dict[bytes, Dialect] = {
    b"application/json": JSON,
    b"application/octet-stream": BARE,
    b"application/x-numpy": NPY,
}


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a request for a prediction.

    Attributes:
        length: bytes of the body, `None` where the head does not say.
        min_version: the oldest version that may answer.
        timeout_s: seconds after which nobody waits for the answer, `None` where the head does not say.
        refusal: why there will be no answer, whatever the body is.
        dialect: how the body is written.
        answer: how the answer is to be written.
    """

    length: int | None = None
    min_version: int = 0
    timeout_s: float | None = None
    refusal: Refusal | None = None
    dialect: Dialect = JSON
    answer: Dialect = JSON


@dataclass(frozen=True, slots=True)
class Rules:
    """What heads are held to: bodies of at most `max_bytes`, and where there is a `token`, that it is carried."""

    max_bytes: int
    token: Token | None = None


def is_hot(path: bytes) -> bool:
    """Return whether a path, as the request has it, is one that predictions are asked for at."""
    return path == b"/predict" or open_inference.is_infer(path)


def read_head(path: bytes, headers: Iterable[tuple[bytes, bytes]], rules: Rules) -> Head:
    """Return what a path and headers, whose names are in lower case, say."""
    named = dict(headers)
    dialect: Dialect | None = None
    answer: Dialect = JSON
    try:
        if path.startswith(b"/v2/"):
            dialect = answer = open_inference.OpenInference.of(path, named)
        if rules.token is not None and not rules.token.is_in(named.get(b"authorization", b"")):
            raise Refusal(
                Code.UNAUTHORIZED, "expected the header Authorization: Bearer TOKEN with the token for predictions"
            )
        length = _number(named, b"content-length", "a number of bytes")
        if length is not None and length > rules.max_bytes:
            raise Refusal(Code.BODY_TOO_LARGE, f"expected at most {rules.max_bytes} bytes, got {length}")
        wanted = _number(named, b"x-min-model-version", "a version number")
        timeout_ms = _number(named, b"x-request-timeout-ms", "a number of milliseconds")
        if dialect is None:
            dialect, answer = _dialect(named), _answer(named)
        if named.get(b"content-encoding", b"identity").lower() != b"identity":
            raise _unsupported(named)
    except Refusal as refusal:
        return Head(refusal=refusal, dialect=dialect or JSON)
    timeout_s = None if timeout_ms is None else min(timeout_ms, _MAX_TIMEOUT_MS) / 1000
    return Head(length, wanted or 0, timeout_s, None, dialect, answer)


def _dialect(headers: dict[bytes, bytes]) -> Dialect:
    """Return how the body is written."""
    kind = headers.get(b"content-type", b"application/json").partition(b";")[0].strip().lower()
    if kind not in _BY_KIND:
        raise _unsupported(headers)
    return _BY_KIND[kind]


def _answer(headers: dict[bytes, bytes]) -> Dialect:
    """Return how the answer is to be written: JSON, unless a kind of bytes is named before it."""
    for part in headers.get(b"accept", b"").split(b","):
        kind = part.partition(b";")[0].strip().lower()
        if kind in _BY_KIND or kind in (b"*/*", b"application/*"):
            return _BY_KIND.get(kind, JSON)
    return JSON


def _unsupported(headers: dict[bytes, bytes]) -> Refusal:
    came = b" ".join(headers[name] for name in (b"content-type", b"content-encoding") if name in headers)
    kinds = ", ".join(kind.decode() for kind in _BY_KIND)
    return Refusal(Code.UNSUPPORTED_MEDIA_TYPE, f"expected plain {kinds}, got {came.decode('latin-1')!r}")


def _number(headers: dict[bytes, bytes], name: bytes, expected: str) -> int | None:
    text = headers.get(name)
    if text is None:
        return None
    if not text.isdigit() or len(text) > _MAX_DIGITS:
        title = name.decode().title()
        raise Refusal(Code.INVALID_HEADER, f"{title}: expected {expected}, got {text[:40].decode('latin-1')!r}")
    return int(text)
