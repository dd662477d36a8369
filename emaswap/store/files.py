"""The few operations on named files that a kind of store supplies. What the files mean is not known here.

A key is a name with at most one folder: "CURRENT", "versions/00000042.json".
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from emaswap.errors import Missing, NotAFile, Short, StoreError, TooLarge, Unreadable
from emaswap.files.tensor_file import Blob

_NOT_A_FILE = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO)
_SHORT = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Entry:
    """A file as a listing shows it: `stamp` changes when its bytes may have, `age_s` is never negative."""

    stamp: str
    age_s: float


class Files(Protocol):
    """Named files in one place. Every operation may raise `StoreError`; an error about one file is `Unreadable`."""

    @property
    def location(self) -> str:
        """What people call the place: a path or a URL."""

    @property
    def watch_path(self) -> Path | None:
        """A directory whose changes show that a file was written; `None` for a kind that has none. Touches nothing."""

    def entries(self, folder: str) -> dict[str, Entry]:
        """List a folder: each name with its entry, all from one listing; empty where there is no such folder.

        Raises `Missing` when the place itself does not exist.
        """

    def entry(self, key: str) -> Entry | None:
        """Return one file's entry; `None` when there is no file."""

    def open(self, key: str) -> BinaryIO:
        """Open a file for reading, unbuffered. Raises `Missing`, or `NotAFile` for a link, a folder or a device."""

    def is_writable(self) -> bool:
        """Return whether this process may write here. Raises `Missing` when the place does not exist."""

    def prepare(self) -> None:
        """Make the place ready for writing, and clear what a killed writer left behind."""

    def add(self, write: Callable[[BinaryIO], Blob], key_of: Callable[[Blob], str]) -> Blob:
        """Write a file under a key that follows from its content, durably."""

    def create(self, key: str, data: bytes) -> bool:
        """Create a file that must not exist, whole and durable at once. `False` when another's is there already."""

    def replace(self, key: str, data: bytes) -> None:
        """Write a file anew, atomically and durably. An empty folder in its place is removed."""

    def delete(self, key: str) -> None:
        """Delete a file, or an empty folder in its place. What is not there is no error."""


@contextmanager
def os_errors(
    task: str, location: str, *, denied: type[StoreError] = StoreError, otherwise: type[StoreError] = StoreError
) -> Iterator[None]:
    """Raise errors of the operating system as ours, saying what was to be done and where.

    Args:
        task: what is done: "read CURRENT".
        location: where.
        denied: what to raise when this process may not do that.
        otherwise: what to raise for an error of no special kind.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise Missing(f"cannot {task} in {location}: {error.strerror}") from error
    except OSError as error:
        said = f"cannot {task} in {location}: {error.strerror or error}"
        if error.errno in _NOT_A_FILE:
            raise NotAFile(f"cannot {task} in {location}: a link or no regular file is there") from error
        if error.errno in _SHORT:
            raise Short(said) from error
        raise (denied if error.errno in _DENIED else otherwise)(said) from error
    except MemoryError as error:
        raise Short(f"cannot {task} in {location}: out of memory") from error


def reading(key: str, location: str) -> AbstractContextManager[None]:
    """Raise errors of reading one file as errors about that file."""
    return os_errors(f"read {key}", location, denied=Unreadable, otherwise=Unreadable)


def read(files: Files, key: str, limit: int) -> bytes:
    """Return a small file's bytes. Raises `TooLarge` when there are more than `limit`."""
    with files.open(key) as file, reading(key, files.location):
        parts = []
        size = 0
        while part := file.read(limit + 1 - size):
            parts.append(part)
            size += len(part)
    if size > limit:
        raise TooLarge(f"{key} in {files.location} is larger than {limit} bytes")
    return b"".join(parts)
