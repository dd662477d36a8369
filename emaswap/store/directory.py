"""A store in a directory, on a local or a network file system.

A file appears under its name only when all of it is on disk: written to `tmp/`, fsynced, renamed or linked into
place, and then the folder is fsynced, too. Links inside the store are never followed.
"""

import errno
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from emaswap.errors import Missing, NotAFile, ReadOnly, StoreError, TooLarge
from emaswap.files import tensor_file
from emaswap.files.digest import Algorithm
from emaswap.files.durable import is_part, sync_folder, written
from emaswap.files.tensor_file import Blob
from emaswap.store.versions import Kind, Store, tensors_key

_FOLDERS = ("versions", "weights", "probes", "tmp")
_STALE_TMP_S = 3600.0


class DirectoryStore(Store):
    """A store whose files are in one directory."""

    def __init__(self, root: Path) -> None:
        """Nothing is touched yet; a reader may be here before the directory is."""
        self.root = root.absolute()
        self.location = str(root)
        self._tmp = self.root / "tmp"

    @property
    def watch_path(self) -> Path | None:
        return self.root if self.root.is_dir() else None

    def open(self, key: str) -> BinaryIO:
        folder, _, name = key.rpartition("/")
        with self._errors(f"read {key}"):
            # Opened by way of the folder, so that a link is refused at either level.
            above = os.open(self.root / folder, os.O_RDONLY | os.O_DIRECTORY | (os.O_NOFOLLOW if folder else 0))
            try:
                # Without O_NONBLOCK, opening a FIFO would wait for a writer for ever.
                handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=above)
            finally:
                os.close(above)
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                os.close(handle)
                raise NotAFile(f"{key} in {self.location} is not a regular file")
            return os.fdopen(handle, "rb", buffering=0)

    def names(self, folder: str) -> dict[str, float]:
        ages = {}
        if not self.root.is_dir():
            raise Missing(f"the store {self.location} does not exist (yet)")
        now = time.time()
        with self._errors(f"list {folder}/"):
            try:
                entries = os.scandir(self.root / folder)
            except FileNotFoundError:
                return {}
            with entries:
                for entry in entries:
                    try:
                        ages[entry.name] = now - entry.stat(follow_symlinks=False).st_mtime
                    except FileNotFoundError:
                        continue  # deleted while we looked
        return ages

    def stamp(self, key: str) -> str | None:
        with self._errors(f"look at {key}"):
            try:
                found = (self.root / key).lstat()
            except FileNotFoundError:
                return None
            return f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"

    def is_writable(self) -> bool:
        return os.access(self.root, os.W_OK | os.X_OK)

    def prepare(self) -> None:
        with self._errors("prepare the store"):
            for folder in _FOLDERS:
                if (self.root / folder).is_symlink():
                    raise NotAFile(f"{folder} in {self.location} is a link, which is not followed")
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            sync_folder(self.root)
        for name, age_s in self.names("tmp").items():
            if is_part(name) and age_s > _STALE_TMP_S:
                self.delete(f"tmp/{name}")

    def add_tensors(self, kind: Kind, tensors: Mapping[str, Tensor], algorithm: Algorithm) -> Blob:
        with (
            self._errors(f"write {kind}"),
            written(self._tmp, lambda file: tensor_file.write(file, tensors, algorithm=algorithm)) as (path, blob),
        ):
            final = self.root / tensors_key(kind, blob.digest)
            path.replace(final)
            sync_folder(final.parent)
        return blob

    def create(self, key: str, data: bytes) -> bool:
        final = self.root / key
        with self._errors(f"create {key}"), written(self._tmp, lambda file: file.write(data)) as (path, _):
            try:
                os.link(path, final)
            except OSError as error:
                # Over a network an error may hide a success: look before believing it.
                if self.stamp(key) is None:
                    if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
                        raise StoreError(
                            f"cannot publish to {self.location}: its file system has no hard links, "
                            "which make a version appear all at once; choose another file system"
                        ) from error
                    raise
                return self._holds(key, data)
            sync_folder(final.parent)
        return True

    def replace(self, key: str, data: bytes) -> None:
        with self._errors(f"write {key}"), written(self._tmp, lambda file: file.write(data)) as (path, _):
            path.replace(self.root / key)
            sync_folder(self.root)

    def delete(self, key: str) -> None:
        with self._errors(f"delete {key}"):
            (self.root / key).unlink(missing_ok=True)

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.read(key, len(data)) == data
        except (NotAFile, TooLarge):
            return False

    @contextmanager
    def _errors(self, task: str) -> Iterator[None]:
        """Errors of the operating system as ours, saying what was to be done and where."""
        try:
            yield
        except FileNotFoundError as error:
            raise Missing(f"cannot {task} in {self.location}: {error.strerror}") from error
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
                raise NotAFile(f"cannot {task} in {self.location}: a link or no regular file is there") from error
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise ReadOnly(f"cannot {task} in {self.location}: {error.strerror}") from error
            raise StoreError(f"cannot {task} in {self.location}: {error.strerror}") from error
