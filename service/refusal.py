"""What the service refuses, and the HTTP status of each refusal: the one table of them."""

from collections.abc import Mapping

STATUS = {
    "invalid_header": 400,
    "invalid_json": 400,
    "unauthorized": 401,
    "admin_is_off": 403,
    "unknown_version": 404,
    "body_timeout": 408,
    "store_is_read_only": 409,
    "version_was_rejected": 409,
    "version_too_old": 412,
    "body_too_large": 413,
    "too_many_rows": 413,
    "unsupported_media_type": 415,
    "invalid_request": 422,
    "invalid_inputs": 422,
    "wrong_dtype": 422,
    "wrong_shape": 422,
    "not_finite": 422,
    "model_refused": 422,
    "queue_is_full": 429,
    "no_live_version": 503,
    "store_unreachable": 503,
}


class Refusal(Exception):
    """A request that is not carried out: a code from the table, and what was expected, what came, what to do."""

    def __init__(self, code: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.status = STATUS[code]
        self.headers = dict(headers or {})
        if self.status in (429, 503):
            self.headers.setdefault("Retry-After", "1")
        if self.status == 401:
            self.headers.setdefault("WWW-Authenticate", "Bearer")
