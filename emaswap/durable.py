"""Files that are wholly on disk before they get their name, so that a crash at any instant leaves the old or the new."""

import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

_PART_NAME = re.compile(r"[0-9a-f]{32}\.part")

Result = TypeVar("Result")


@contextmanager
def written(folder: Path, write: Callable[[BinaryIO], Result]) -> Iterator[tuple[Path, Result]]:
    """A new file in `folder` with all its bytes on disk, to be renamed or linked; removed at the end if still there."""
    path = folder / f"{uuid.uuid4().hex}.part"
    try:
        with path.open("xb") as file:
            result = write(file)
            file.flush()
            os.fsync(file.fileno())
        yield path, result
    finally:
        path.unlink(missing_ok=True)


def is_part(name: str) -> bool:
    """Whether a file of this name was being written by `written`."""
    return _PART_NAME.fullmatch(name) is not None


def sync_folder(path: Path) -> None:
    """Put a folder's own entries on disk: without it a rename may be lost with the power."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
