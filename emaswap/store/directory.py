"""Files in a directory, on a local or a network file system.

A file appears under its name only when all of it is on disk: written to `tmp/`, fsynced, renamed or linked into
place, and then the folder is fsynced, too. Links inside the directory are never followed.
"""

import errno
import os
import stat
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from emaswap.errors import Missing, NotAFile, ReadOnly, StoreError, TooLarge, Unreadable
from emaswap.files.durable import is_part, sync_folder, written
from emaswap.files.tensor_file import Blob
from emaswap.store.files import Entry, Files, os_errors, read, reading
from emaswap.store.keys import KINDS, TMP, VERSIONS
from emaswap.store.versions import Store

_FOLDERS = (VERSIONS, *KINDS, TMP)
_STALE_TMP_S = 3600.0


class DirectoryStore(Store):
    """A store whose files are in one directory."""

    def __init__(self, root: Path) -> None:
        """Nothing is touched yet; a reader may be here before the directory is."""
        super().__init__(Directory(root))
        self.root = root.absolute()


@dataclass(frozen=True)
class _Above:
    """The folder of a file. Its `inode` tells it from another that takes its place, or from a link to it."""

    inode: int
    linked: bool


class Directory(Files):
    """The files below one directory."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._location = os.fsencode(root).decode(errors="backslashreplace")  # to be shown and sent
        self._tmp = self._root / TMP

    @property
    def location(self) -> str:
        return self._location

    @property
    def watch_path(self) -> Path | None:
        return self._root

    def entries(self, folder: str) -> dict[str, Entry]:
        self._expect_root()
        found = {}
        with os_errors(f"list {folder}/", self._location):
            try:
                listed = os.scandir(self._root / folder)
            except FileNotFoundError:
                return {}
            with listed:
                above, now = self._above(folder), time.time()
                for each in listed:
                    with suppress(FileNotFoundError):  # deleted while we looked
                        found[each.name] = _entry(each.stat(follow_symlinks=False), above, now)
        return found

    def entry(self, key: str) -> Entry | None:
        with reading(key, self._location):
            try:
                return _entry((self._root / key).lstat(), self._above(key.rpartition("/")[0]), time.time())
            except FileNotFoundError:
                return None

    def open(self, key: str) -> BinaryIO:
        folder, _, name = key.rpartition("/")
        with reading(key, self._location):
            # Opened by way of the folder, so that a link is refused at either level.
            above = os.open(self._root / folder, os.O_RDONLY | os.O_DIRECTORY | (os.O_NOFOLLOW if folder else 0))
            try:
                # Without O_NONBLOCK, opening a FIFO would wait for a writer for ever.
                handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=above)
            finally:
                os.close(above)
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                os.close(handle)
                raise NotAFile(f"{key} in {self._location} is not a regular file")
            return os.fdopen(handle, "rb", buffering=0)

    def is_writable(self) -> bool:
        self._expect_root()
        return os.access(self._root, os.W_OK | os.X_OK)

    def prepare(self) -> None:
        with self._writing("prepare the store"):
            for folder in _FOLDERS:
                if (self._root / folder).is_symlink():
                    raise NotAFile(f"{folder} in {self._location} is a link, which is not followed")
                (self._root / folder).mkdir(parents=True, exist_ok=True)
            sync_folder(self._root)
        for name, entry in self.entries(TMP).items():
            if is_part(name) and entry.age_s > _STALE_TMP_S:
                self.delete(f"{TMP}/{name}")

    def add(self, write: Callable[[BinaryIO], Blob], key_of: Callable[[Blob], str]) -> Blob:
        with self._writing("add a file"), written(self._tmp, write) as (path, blob):
            final = self._root / key_of(blob)
            path.replace(final)
            sync_folder(final.parent)
        return blob

    def create(self, key: str, data: bytes) -> bool:
        final = self._root / key
        with self._writing(f"create {key}"), written(self._tmp, lambda file: file.write(data)) as (path, _):
            try:
                os.link(path, final)
            except OSError as error:
                # Over a network an error may hide a success: look before believing it.
                if self.entry(key) is None:
                    if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
                        raise StoreError(
                            f"cannot publish to {self._location}: a hard link, which makes a version appear all at once, "
                            f"is refused ({error.strerror}); if its file system has none, choose another"
                        ) from error
                    raise
                return self._holds(key, data)
            sync_folder(final.parent)
        return True

    def replace(self, key: str, data: bytes) -> None:
        final = self._root / key
        with self._writing(f"write {key}"), written(self._tmp, lambda file: file.write(data)) as (path, _):
            _remove_folder(final)
            path.replace(final)
            sync_folder(final.parent)

    def delete(self, key: str) -> None:
        with self._writing(f"delete {key}"):
            if not _remove_folder(self._root / key):
                (self._root / key).unlink(missing_ok=True)

    def _expect_root(self) -> None:
        try:
            found = self._root.stat()
        except FileNotFoundError:
            raise Missing(f"the store {self._location} does not exist (yet)") from None
        except OSError as error:
            raise StoreError(f"the store {self._location} cannot be reached: {error.strerror}") from error
        if not stat.S_ISDIR(found.st_mode):
            raise StoreError(f"the store {self._location} is no directory")

    def _above(self, folder: str) -> "_Above":
        return _Above((self._root / folder).lstat().st_ino if folder else 0, folder == VERSIONS)

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return read(self, key, len(data)) == data
        except (NotAFile, TooLarge, Unreadable):
            return False

    def _writing(self, task: str) -> AbstractContextManager[None]:
        return os_errors(task, self._location, denied=ReadOnly)


def _remove_folder(path: Path) -> bool:
    """Remove a folder that is in a file's place, if there is one. Raises `OSError` when it holds something."""
    is_folder = path.is_dir() and not path.is_symlink()
    if is_folder:
        path.rmdir()
    return is_folder


def _entry(found: os.stat_result, above: _Above, now: float) -> Entry:
    # The change of its state shows what was restored with its old time of modification. Only, a manifest is linked into
    # place: its state changes once more when the name under which it was written is removed.
    changed = "" if above.linked else f"-{found.st_ctime_ns}"
    stamp = f"{above.inode}-{found.st_ino}-{found.st_size}-{found.st_mtime_ns}{changed}"
    return Entry(stamp, max(0.0, now - found.st_mtime))
