"""Every exception that emaswap raises on purpose.

EmaswapError
├── EmaError            an average was asked for something it cannot give
├── StoreError          the store could not be read or written just now
│   ├── Missing         a file that was asked for is not there
│   ├── NotAFile        a link, a folder or a device stands where a file should
│   ├── TooLarge        a file is larger than such a file can be
│   ├── Unreadable      one file cannot be read just now; the others can
│   ├── Short           memory, handles or disk space are short just now
│   └── ReadOnly        this process may not write there
├── BadVersion          a version is not what it claims to be; carries a `Reason`
└── PublishError        a version could not be published; the store is as it was
    └── Fenced          another publisher has taken the store over; stop
"""

import threading
from enum import StrEnum

_MAX_DETAIL = 10_000


class EmaswapError(Exception):
    """The root of the tree: catch this to catch all of it."""


class EmaError(EmaswapError):
    """An average was asked for something it cannot give."""


class StoreError(EmaswapError):
    """The store could not be read or written just now; trying again later may work."""


class Missing(StoreError):
    """A file that was asked for is not in the store (never written, or pruned meanwhile)."""


class NotAFile(StoreError):
    """A link, a folder or a device stands where a regular file should; it is not followed."""


class TooLarge(StoreError):
    """A file is larger than such a file can be; it is not read."""


class Unreadable(StoreError):
    """One file cannot be read just now: no permission, or an I/O error. This says nothing about other files."""


class Short(StoreError):
    """Memory, file handles or disk space are short just now; nothing is wrong with what was to be read or written."""


class ReadOnly(StoreError):
    """This process may not write to the store: no permission, or a file system mounted read-only."""


class Reason(StrEnum):
    """Why a version was rejected: the label in logs, in `/model/versions` and in metrics."""

    MANIFEST_INVALID = "manifest_invalid"
    FORMAT_UNKNOWN = "format_unknown"
    STALE_TERM = "stale_term"
    OUT_OF_LINE = "out_of_line"
    VARIANT_MISSING = "variant_missing"
    FILE_MISSING = "file_missing"
    NOT_A_FILE = "not_a_file"
    TOO_LARGE = "too_large"
    SIZE_MISMATCH = "size_mismatch"
    DIGEST_MISMATCH = "digest_mismatch"
    HEADER_TOO_LARGE = "header_too_large"
    HEADER_INVALID = "header_invalid"
    UNTRUSTED_FACTORY = "untrusted_factory"
    FACTORY_FAILED = "factory_failed"
    MISSING_TENSOR = "missing_tensor"
    UNEXPECTED_TENSOR = "unexpected_tensor"
    WRONG_SHAPE = "wrong_shape"
    WRONG_DTYPE = "wrong_dtype"
    NOT_FINITE = "not_finite"
    PROBE_FAILED = "probe_failed"
    PROBE_MISMATCH = "probe_mismatch"
    FORWARD_TIMEOUT = "forward_timeout"
    ANSWERS_NOT_FINITE = "answers_not_finite"


class BadVersion(EmaswapError):
    """A version is not what it claims to be, and must not go live.

    The detail may hold text from the version itself or from its factory. It is cut where it is long, and what is no
    text in it is escaped.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        detail = detail.encode(errors="backslashreplace").decode()
        if len(detail) > _MAX_DETAIL:
            detail = f"{detail[:_MAX_DETAIL]} [{len(detail) - _MAX_DETAIL} more characters]"
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def describe(error: BaseException) -> str:
    """Return an exception's type and message. Never raises, even where the exception's own text does."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def is_interrupt(error: BaseException) -> bool:
    """Return whether an exception stops this program, rather than having been raised by somebody else's code."""
    return isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


class PublishError(EmaswapError):
    """A version could not be published; what was in the store before is still there, whole."""


class Fenced(PublishError):
    """Another publisher with a higher (or the same) term has taken the store over; this one must stop."""
