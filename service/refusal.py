"""What the service refuses: a code for each kind of refusal, and the words that go with it. Knows no HTTP."""

from enum import StrEnum

MAX_DETAIL = 2000
"""The most characters of a detail. A client or a model may have put megabytes into one."""


class Code(StrEnum):
    """The kinds of refusals, as clients see them."""

    INVALID_HTTP = "invalid_http"
    INVALID_HEADER = "invalid_header"
    INVALID_JSON = "invalid_json"
    UNAUTHORIZED = "unauthorized"
    ADMIN_IS_OFF = "admin_is_off"
    NOT_FOUND = "not_found"
    UNKNOWN_VERSION = "unknown_version"
    UNKNOWN_MODEL = "unknown_model"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    NOT_ACCEPTABLE = "not_acceptable"
    HEAD_TIMEOUT = "head_timeout"
    BODY_TIMEOUT = "body_timeout"
    STORE_IS_READ_ONLY = "store_is_read_only"
    VERSION_WAS_REJECTED = "version_was_rejected"
    VERSION_TOO_OLD = "version_too_old"
    BODY_TOO_LARGE = "body_too_large"
    TOO_MANY_ROWS = "too_many_rows"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    INVALID_REQUEST = "invalid_request"
    INVALID_INPUTS = "invalid_inputs"
    WRONG_DTYPE = "wrong_dtype"
    WRONG_SHAPE = "wrong_shape"
    NOT_FINITE = "not_finite"
    MODEL_REFUSED = "model_refused"
    QUEUE_IS_FULL = "queue_is_full"
    HEAD_TOO_LARGE = "head_too_large"
    INTERNAL_ERROR = "internal_error"
    FORWARD_TIMEOUT = "forward_timeout"
    NO_LIVE_VERSION = "no_live_version"
    OUT_OF_MEMORY = "out_of_memory"
    SUPERVISOR_UNREACHABLE = "supervisor_unreachable"
    STORE_UNREACHABLE = "store_unreachable"
    VERSION_CHANGED = "version_changed"
    DEADLINE_EXCEEDED = "deadline_exceeded"


class Refusal(Exception):
    """A request that is not carried out: its code, and what was expected, what came, what to do."""

    def __init__(self, code: Code, detail: str) -> None:
        self.code = code
        self.detail = shorten(detail)
        super().__init__(f"{code}: {self.detail}")


def shorten(text: str) -> str:
    """Return a text with its middle left out where it is longer than a detail may be."""
    if len(text) <= MAX_DETAIL:
        return text
    half = MAX_DETAIL // 2 - 50
    return f"{text[:half]} [{len(text) - 2 * half} characters left out] {text[-half:]}"
