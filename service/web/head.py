"""What the head of a request for a prediction says: how long its body is, how its rows are written, what it demands."""

from collections.abc import Iterable
from dataclasses import dataclass

from service.refusal import Code, Refusal

_MAX_DIGITS = 15
_MAX_TIMEOUT_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a request for a prediction.

    Attributes:
        length: bytes of the body, `None` where the head does not say.
        min_version: the oldest version that may answer.
        timeout_s: seconds after which nobody waits for the answer, `None` where the head does not say.
        refusal: why there will be no answer, whatever the body is.
    """

    length: int | None = None
    min_version: int = 0
    timeout_s: float | None = None
    refusal: Refusal | None = None


def read_head(headers: Iterable[tuple[bytes, bytes]], *, max_bytes: int) -> Head:
    """Return what these headers say. Names are in lower case; a body may have at most `max_bytes`."""
    named = dict(headers)
    try:
        length = _number(named, b"content-length", "a number of bytes")
        if length is not None and length > max_bytes:
            raise Refusal(Code.BODY_TOO_LARGE, f"expected at most {max_bytes} bytes, got {length}")
        wanted = _number(named, b"x-min-model-version", "a version number")
        timeout_ms = _number(named, b"x-request-timeout-ms", "a number of milliseconds")
        kind = named.get(b"content-type", b"application/json").partition(b";")[0].strip().lower()
        if kind != b"application/json" or named.get(b"content-encoding", b"identity").lower() != b"identity":
            came = b" ".join(named[name] for name in (b"content-type", b"content-encoding") if name in named)
            raise Refusal(
                Code.UNSUPPORTED_MEDIA_TYPE, f"expected plain application/json, got {came.decode('latin-1')!r}"
            )
    except Refusal as refusal:
        return Head(refusal=refusal)
    return Head(length, wanted or 0, None if timeout_ms is None else min(timeout_ms, _MAX_TIMEOUT_MS) / 1000)


def _number(headers: dict[bytes, bytes], name: bytes, expected: str) -> int | None:
    text = headers.get(name)
    if text is None:
        return None
    if not text.isdigit() or len(text) > _MAX_DIGITS:
        title = name.decode().title()
        raise Refusal(Code.INVALID_HEADER, f"{title}: expected {expected}, got {text[:40].decode('latin-1')!r}")
    return int(text)
