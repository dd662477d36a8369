"""Store: the versions of one model, over the files of a directory or of another kind of place."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from emaswap.errors import BadVersion, Missing, NotAFile, Reason, TooLarge, Unreadable
from emaswap.files import tensor_file
from emaswap.files.digest import Algorithm, Digest, digest_of
from emaswap.files.tensor_file import Blob, Memory, TensorFile, private_memory
from emaswap.store import look
from emaswap.store.files import Entry, Files, read, reading
from emaswap.store.keys import Kind, digest_in, manifest_key, tensors_key
from emaswap.store.look import Look
from emaswap.store.orders import Orders
from emaswap.versions import proof
from emaswap.versions.manifest import MAX_MANIFEST_BYTES, Identity, Manifest
from emaswap.versions.probe import Probe
from emaswap.versions.proof import Fetched


class Store:
    """Versions of one model.

    Every method may raise `StoreError` when the store cannot be reached, `Unreadable` when it is only one file that
    cannot be read just now, and `Short` when this process lacks memory, handles or disk space for it.
    """

    def __init__(self, files: Files) -> None:
        """Nothing is touched before it is used."""
        self.files = files
        self.orders = Orders(files)

    @property
    def location(self) -> str:
        """What people call it: a path or a URL."""
        return self.files.location

    @property
    def watch_path(self) -> Path | None:
        """A directory whose changes show that something was published or pinned; `None` where there is none.

        It need not exist, and asking for it touches nothing.
        """
        return self.files.watch_path

    def is_writable(self) -> bool:
        """Return whether this process may write here. Raises `Missing` when the store does not exist."""
        return self.files.is_writable()

    def prepare(self) -> None:
        """Make the store ready for writing, and clear what a killed publisher left behind."""
        self.files.prepare()

    # -- which versions there are -----------------------------------------------------------------------------------

    def look(self) -> Look:
        """Look at the whole store once: its versions, from one listing, and the pin in force."""
        # The pin comes last: an order that was given before a version was committed holds wherever that version is seen.
        versions = look.seen(self.files)
        pin = self.orders.pin()
        return Look(look.including(self.files, versions, pin.version) if pin else versions, pin)

    def seen(self) -> Look:
        """Look at the versions alone: whatever became of the pin, it is neither read nor shown."""
        return Look(look.seen(self.files))

    def versions(self) -> list[int]:
        """Return the numbers of all committed versions, ascending."""
        return list(self.seen().numbers)

    def newest(self) -> int:
        """Return the newest number in the line, 0 when there is none."""
        return self.seen().newest

    def has(self, version: int) -> bool:
        """Return whether a version is committed, whatever its manifest says."""
        return self.files.entry(manifest_key(version)) is not None

    def age_s(self, version: int) -> float:
        """Return the seconds since a version was committed, by the file's time. Raises `Missing` when there is none.

        For the ages of many versions take one `look`.
        """
        entry = self.files.entry(manifest_key(version))
        if entry is None:
            raise Missing(f"version {version} is not in {self.location}")
        return entry.age_s

    def hint(self) -> int:
        """Return what CURRENT says, 0 when it says nothing that can be read. It is never the truth."""
        return look.hint(self.files)

    def point_to(self, version: int) -> None:
        """Make CURRENT name this version."""
        look.point_to(self.files, version)

    # -- what they say of themselves --------------------------------------------------------------------------------

    def manifest_bytes(self, version: int) -> bytes:
        """Return a version's manifest as it is stored.

        Raises `Missing` when there is none, `BadVersion` when it is no file that can be a manifest.
        """
        try:
            return read(self.files, manifest_key(version), MAX_MANIFEST_BYTES)
        except NotAFile as error:
            raise BadVersion(Reason.NOT_A_FILE, str(error)) from None
        except TooLarge as error:
            raise BadVersion(Reason.MANIFEST_INVALID, str(error)) from None

    def manifest(self, version: int) -> Manifest:
        """Return a version's manifest. Raises `Missing` when there is none, `BadVersion` when it cannot be right."""
        manifest = Manifest.decode(self.manifest_bytes(version))
        if manifest.version != version:
            raise BadVersion(Reason.MANIFEST_INVALID, f"it is of version {manifest.version}, filed as {version}")
        return manifest

    def readable(self, version: int) -> Manifest | None:
        """Return a version's manifest; `None` when it is missing, cannot be right, or cannot be read just now."""
        try:
            return self.manifest(version)
        except (BadVersion, Missing, Unreadable):
            return None

    def identity(self, version: int) -> Identity:
        """Return the identity of the version that has this number, however little its manifest can be understood.

        Raises `Missing` when there is none, `BadVersion` when it is no file that can be a manifest.
        """
        return Identity(version, digest_of(self.manifest_bytes(version)))

    def commit(self, version: int, data: bytes) -> bool:
        """Commit a version: create its manifest, whole and durable at once. `False` when another's is there already.

        The files that the manifest names must be in the store by then.
        """
        return self.files.create(manifest_key(version), data)

    # -- their files ------------------------------------------------------------------------------------------------

    def add_tensors(self, kind: Kind, tensors: Mapping[str, Tensor], algorithm: Algorithm = "blake3") -> Blob:
        """Write a tensor file under the name of its digest, durably."""
        return self.files.add(
            lambda file: tensor_file.write(file, tensors, algorithm=algorithm),
            lambda blob: tensors_key(kind, blob.digest),
        )

    def tensors(self, kind: Kind, blob: Blob, into: Memory = private_memory) -> TensorFile:
        """Return a tensor file, verified while it is read into memory.

        Raises `BadVersion` when it is missing or not what it should be, `Short` when there is no memory for it.
        """
        key = tensors_key(kind, blob.digest)
        try:
            with self.files.open(key) as file, reading(key, self.location):
                return tensor_file.read(file, blob, into)
        except Missing as error:
            raise BadVersion(Reason.FILE_MISSING, str(error)) from None
        except NotAFile as error:
            raise BadVersion(Reason.NOT_A_FILE, str(error)) from None
        except BadVersion as error:
            raise BadVersion(error.reason, f"{key}: {error.detail}") from None

    def fetch(self, manifest: Manifest, *, max_bytes: int | None = None, into: Memory = private_memory) -> Fetched:
        """Read a version's weights (`into` memory of the caller's) and probe once, verified against its manifest.

        Raises `BadVersion` when a file is missing or not what it should be, or the weights take more than `max_bytes`.
        """
        proof.check_size(manifest, max_bytes)
        weights = self.tensors("weights", manifest.weights, into).tensors
        return Fetched(weights, Probe.from_tensors(self.tensors("probes", manifest.probe).tensors))

    def stored(self, kind: Kind) -> dict[Digest, Entry]:
        """List the tensor files of a kind by their digests, whichever version they belong to."""
        listed = ((digest_in(name), entry) for name, entry in self.files.entries(kind).items())
        return {digest: entry for digest, entry in listed if digest}

    def stamps(self, version: int) -> dict[str, str | None]:
        """Return the stamps of all files of a version: equal stamps mean that its bytes are what they were.

        Of a version whose manifest cannot be read, this is the manifest's alone.
        """
        keys = [manifest_key(version)]
        if manifest := self.readable(version):
            keys += [tensors_key(kind, blob.digest) for kind, blob in manifest.files()]
        return {key: self._stamp(key) for key in keys}

    def _stamp(self, key: str) -> str | None:
        try:
            entry = self.files.entry(key)
        except Unreadable:
            return None
        return entry.stamp if entry else None
