"""The store's words (versions, manifests, weights, probes, CURRENT, PIN) over a few operations on named files.

    versions/00000042.json         the manifest; creating it exclusively is the commit
    weights/<digest>.safetensors   immutable, named by content
    probes/<digest>.safetensors
    CURRENT                        a hint {"version": 42}: never the truth
    PIN                            {"version": 41, "reason": ..., "at": ...} when an operator pinned one
    tmp/                           files being written

A kind of store (a directory, a bucket) supplies the operations; what they mean is here, once.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from emaswap.errors import BadVersion, Missing, NotAFile, Reason, StoreError, TooLarge
from emaswap.files import tensor_file
from emaswap.files.digest import Algorithm, Digest, stem_of
from emaswap.files.tensor_file import Blob, TensorFile
from emaswap.versions.manifest import MAX_MANIFEST_BYTES, Manifest, Pin, Version

Kind = Literal["weights", "probes"]

CURRENT, PIN = "CURRENT", "PIN"
_MAX_NOTE_BYTES = 64 << 10
_MANIFEST_NAME = re.compile(r"(\d{8,15})\.json")


class _Current(BaseModel):
    model_config = ConfigDict(frozen=True)

    version: Version


def manifest_key(version: int) -> str:
    """The key of a version's manifest."""
    return f"versions/{version:08d}.json"


def tensors_key(kind: Kind, digest: Digest) -> str:
    """The key of a tensor file; a validated digest is nothing but an algorithm's name and hex, so no path can be made of it."""
    return f"{kind}/{stem_of(digest)}.safetensors"


class Store(ABC):
    """Versions of one model. Every method may raise `StoreError` when the store cannot be reached."""

    location: str
    """What people call it: a path or a URL."""

    # -- operations on files, for a kind of store to supply --------------------------------------------------------

    @property
    @abstractmethod
    def watch_path(self) -> Path | None:
        """A directory whose changes show that something was published or pinned; `None` where there is none."""

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """A file for reading, unbuffered. Raises `Missing`, or `NotAFile` for a link, a folder or a device."""

    @abstractmethod
    def names(self, folder: str) -> dict[str, float]:
        """The names in a folder (empty where there is none), each with its age in seconds."""

    @abstractmethod
    def stamp(self, key: str) -> str | None:
        """A text that changes when the file's bytes may have; `None` when there is no file."""

    @abstractmethod
    def is_writable(self) -> bool:
        """Whether this process may write here."""

    @abstractmethod
    def prepare(self) -> None:
        """Make the store ready for writing, and clear what a killed publisher left in `tmp/`."""

    @abstractmethod
    def add_tensors(self, kind: Kind, tensors: Mapping[str, Tensor], algorithm: Algorithm) -> Blob:
        """Write a tensor file under the name of its digest, durably."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Create a file that must not exist, whole and durable at once. `False` when another's is there already."""

    @abstractmethod
    def replace(self, key: str, data: bytes) -> None:
        """Write a file anew, atomically and durably."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete a file; it is no error when there is none."""

    # -- versions ---------------------------------------------------------------------------------------------------

    def versions(self) -> list[int]:
        """The numbers of all committed versions, ascending.

        The listing, the hint and a look at the next number are asked together: a listing may lag behind on a network
        file system, and a publisher may die between its commit and CURRENT.
        """
        matches = map(_MANIFEST_NAME.fullmatch, self.names("versions"))
        # Only a version's own name counts: 000000099.json is another file than that of version 99.
        numbers = [int(match[1]) for match in matches if match and f"{int(match[1]):08d}" == match[1]]
        found = sorted(numbers)
        newest = found[-1] if found else 0
        ahead = self.hint()
        if ahead <= newest or self.stamp(manifest_key(ahead)) is None:
            ahead = newest + 1
        while self.stamp(manifest_key(ahead)) is not None:
            found.append(ahead)
            ahead += 1
        return found

    def newest(self) -> int:
        """The number of the newest committed version, 0 when there is none."""
        return max(self.versions(), default=0)

    def hint(self) -> int:
        """What CURRENT says, 0 when it says nothing that can be read."""
        try:
            return _Current.model_validate_json(self.read(CURRENT, _MAX_NOTE_BYTES)).version
        except (Missing, NotAFile, TooLarge, ValidationError):
            return 0

    def point_to(self, version: int) -> None:
        """Make CURRENT name this version."""
        self.replace(CURRENT, _Current(version=version).model_dump_json().encode())

    def manifest_bytes(self, version: int) -> bytes:
        """A version's manifest as it is stored. Raises `Missing` when there is none."""
        return self.read(manifest_key(version), MAX_MANIFEST_BYTES)

    def manifest(self, version: int) -> Manifest:
        """A version's manifest. Raises `Missing` when there is none, `BadVersion` when it cannot be right."""
        try:
            data = self.manifest_bytes(version)
        except NotAFile as error:
            raise BadVersion(Reason.NOT_A_FILE, str(error)) from None
        except TooLarge as error:
            raise BadVersion(Reason.MANIFEST_INVALID, str(error)) from None
        manifest = Manifest.decode(data)
        if manifest.version != version:
            raise BadVersion(Reason.MANIFEST_INVALID, f"it is of version {manifest.version}, filed as {version}")
        return manifest

    def tensors(self, kind: Kind, blob: Blob) -> TensorFile:
        """A tensor file, verified while it is read. Raises `BadVersion` when it is missing or not what it should be."""
        key = tensors_key(kind, blob.digest)
        try:
            with self.open(key) as file:
                return tensor_file.read(file, blob)
        except Missing as error:
            raise BadVersion(Reason.FILE_MISSING, str(error)) from None
        except NotAFile as error:
            raise BadVersion(Reason.NOT_A_FILE, str(error)) from None
        except BadVersion as error:
            raise BadVersion(error.reason, f"{key}: {error.detail}") from None
        except OSError as error:
            raise StoreError(f"cannot read {key} in {self.location}: {error}") from error

    def files_of(self, version: int) -> list[str]:
        """The keys of the files that make up a version, as far as its manifest can be read."""
        keys = [manifest_key(version)]
        try:
            manifest = self.manifest(version)
        except (BadVersion, Missing):
            return keys
        return [
            *keys,
            tensors_key("weights", manifest.weights.digest),
            tensors_key("probes", manifest.probe.digest),
        ]

    def stamps(self, version: int) -> dict[str, str | None]:
        """The stamps of all files of a version: equal stamps mean that its bytes are what they were."""
        return {key: self.stamp(key) for key in self.files_of(version)}

    # -- the pin ----------------------------------------------------------------------------------------------------

    def pin(self) -> Pin | None:
        """The operator's pin, if there is one."""
        try:
            return Pin.model_validate_json(self.read(PIN, _MAX_NOTE_BYTES))
        except Missing:
            self.names("versions")  # raises when it is the store itself that is not there
            return None
        except ValidationError as error:
            raise StoreError(f"PIN in {self.location} cannot be understood; pin again or unpin: {error}") from None

    def set_pin(self, pin: Pin) -> None:
        """Pin a version. Raises `Missing` when it is not in the store, `ReadOnly` where this process may not write."""
        if self.stamp(manifest_key(pin.version)) is None:
            raise Missing(f"version {pin.version} is not in {self.location}: it has {_ranges(self.versions())}")
        self.replace(PIN, pin.model_dump_json().encode())

    def clear_pin(self) -> None:
        """Remove the pin. Raises `ReadOnly` where this process may not write."""
        self.delete(PIN)

    def read(self, key: str, limit: int) -> bytes:
        """A small file's bytes. Raises `TooLarge` when there are more than `limit`."""
        try:
            with self.open(key) as file:
                parts = []
                size = 0
                while part := file.read(limit + 1 - size):
                    parts.append(part)
                    size += len(part)
        except OSError as error:
            raise StoreError(f"cannot read {key} in {self.location}: {error}") from error
        if size > limit:
            raise TooLarge(f"{key} in {self.location} is larger than {limit} bytes")
        return b"".join(parts)


def _ranges(versions: list[int]) -> str:
    if not versions:
        return "no version yet"
    return f"{len(versions)} versions from {versions[0]} to {versions[-1]}"
