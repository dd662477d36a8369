"""A refusal over HTTP: each code has a status, and what goes out is short and can be encoded."""

import json

import pytest

from service.refusal import MAX_DETAIL, Code, Refusal
from service.web import refused


def test_every_code_has_a_status() -> None:
    """No refusal can be raised that HTTP has no status for."""
    assert refused.STATUS.keys() == set(Code)
    assert all(400 <= status < 600 for status in refused.STATUS.values())


@pytest.mark.parametrize("size", [MAX_DETAIL, MAX_DETAIL + 1, 20 << 20], ids=["the limit", "one more", "20 MB"])
def test_a_detail_has_a_bound(size: int) -> None:
    """However much is put into a detail, little goes out: its beginning, its end, and how much was left out."""
    refusal = Refusal(Code.MODEL_REFUSED, "begin" + "x" * (size - 8) + "end")
    assert len(refusal.detail) <= MAX_DETAIL
    assert len(str(refusal)) <= MAX_DETAIL + 100
    assert refusal.detail.startswith("begin")
    assert refusal.detail.endswith("end")
    assert ("left out" in refusal.detail) == (size > MAX_DETAIL)


def test_text_that_cannot_be_encoded_is_escaped() -> None:
    """Half a surrogate pair, which UTF-8 does not have, ends no answer in an error."""
    body = refused.body(Refusal(Code.MODEL_REFUSED, "no \ud800 token"))
    assert json.loads(body) == {"error": "model_refused", "detail": "no \\ud800 token"}


@pytest.mark.parametrize("code", list(Code))
def test_who_may_try_again_is_told_when(code: Code) -> None:
    """Where trying again helps, `Retry-After` says so."""
    headers = refused.headers(Refusal(code, "why"))
    assert ("Retry-After" in headers) == (refused.STATUS[code] in (429, 503))
