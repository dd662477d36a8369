"""What went wrong in somebody else's `forward`: in words, and whose fault it can be."""

import errno
from dataclasses import dataclass
from enum import StrEnum

import torch

from emaswap import errors
from service.refusal import shorten

# torch has no class of its own for memory that ran out on the CPU or in a CUDA library.
_MEMORY_WORDS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "_status_alloc_failed",
)
_MAX_CAUSES = 10


class Cause(StrEnum):
    """Whose fault it was that a forward pass failed: ours, the request's, or the version's, in two ways."""

    MEMORY = "memory"
    REQUEST = "request"
    VERSION = "version"
    TIMEOUT = "timeout"


@dataclass(frozen=True)
class Failure:
    """An exception's text and place. The exception itself would keep the tensors of its frames alive."""

    text: str
    place: str
    memory: bool

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Describe an exception, whatever it is, and take its traceback from it.

        A module may raise one and the same exception again and again, and each time the traceback would be longer.
        """
        place = ""
        if (last := error.__traceback__) is not None:
            while last.tb_next is not None:
                last = last.tb_next
            code = last.tb_frame.f_code
            place = f"{code.co_filename}:{last.tb_lineno} in {code.co_name}"
        error.__traceback__ = None
        return cls(describe(error), place, out_of_memory(error))


def describe(error: BaseException) -> str:
    """Return an exception's type and message, shortened. Never raises, even where the exception's own text does."""
    return shorten(errors.describe(error))


def out_of_memory(error: BaseException | None) -> bool:
    """Return whether an exception, or what it was raised from, says that memory ran out."""
    for _ in range(_MAX_CAUSES):
        if error is None:
            return False
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError):
            text = describe(error).lower()
            if any(words in text for words in _MEMORY_WORDS):
                return True
        error = error.__cause__ or error.__context__
    return False
