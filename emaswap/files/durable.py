"""Files that are wholly on disk before they get their name, so that a crash at any instant leaves the old or the new."""

import ctypes
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PART_NAME = re.compile(r"[0-9a-f]{32}\.part")

# How much is written before the disk is set to work on it.
_FLOW_BYTES = 8 << 20
# Linux's call that starts to write out a part of a file, and waits for nothing; other systems lack it.
_start_writing_out = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _start_writing_out is not None:
    _start_writing_out.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_SYNC_FILE_RANGE_WRITE = 2

Result = TypeVar("Result")


@contextmanager
def written(folder: Path, write: Callable[[BinaryIO], Result]) -> Iterator[tuple[Path, Result]]:
    """Yield a new file in `folder` with all its bytes on disk, to be renamed or linked; remove it at the end if still there."""
    path = folder / f"{uuid.uuid4().hex}.part"
    try:
        with BufferedWriter(_Flowing(path, "x")) as file:
            result = write(file)
            file.flush()
            os.fsync(file.fileno())
        yield path, result
    finally:
        path.unlink(missing_ok=True)


class _Flowing(FileIO):
    """A file whose bytes are on their way to the disk while more are written, so that fsync has less to wait for."""

    _waiting = 0

    def write(self, data: "ReadableBuffer", /) -> int:
        count = super().write(data)
        self._waiting += count
        if self._waiting >= _FLOW_BYTES and _start_writing_out is not None:
            # Whether it worked does not matter: fsync does all that is left, and tells of errors.
            _start_writing_out(self.fileno(), self.tell() - self._waiting, self._waiting, _SYNC_FILE_RANGE_WRITE)
            self._waiting = 0
        return count


def is_part(name: str) -> bool:
    """Return whether a file of this name was being written by `written`."""
    return _PART_NAME.fullmatch(name) is not None


def sync_folder(path: Path) -> None:
    """Put a folder's own entries on disk: without it a rename may be lost with the power."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
