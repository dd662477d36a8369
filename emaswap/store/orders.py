"""What operators say: that one version is the one to serve. It is kept in the store, so it holds for the whole fleet."""

from contextlib import suppress
from datetime import UTC, datetime

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from emaswap.errors import BadVersion, EmaswapError, Missing, NotAFile, ReadOnly, StoreError, TooLarge, Unreadable
from emaswap.files.digest import digest_of
from emaswap.store.files import Files, read
from emaswap.store.keys import MAX_NOTE_BYTES, PIN, manifest_key, tensors_key
from emaswap.store.look import seen
from emaswap.versions.manifest import MAX_MANIFEST_BYTES, Manifest, Pin, in_a_line


class Orders:
    """The orders in one store. An order that cannot be read is an error, never none: an operator has said something."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def pin(self) -> Pin | None:
        """Return the pin, if there is one. Raises `StoreError` when it cannot be understood."""
        try:
            return Pin.model_validate_json(read(self._files, PIN, MAX_NOTE_BYTES), strict=True)
        except Missing:
            self._files.is_writable()  # raises when it is the store that is not there
            return None
        except (ValidationError, NotAFile, TooLarge) as error:
            why = in_a_line(error) if isinstance(error, ValidationError) else str(error)
            raise StoreError(f"PIN in {self._files.location} cannot be understood; pin again or unpin: {why}") from None

    def set_pin(self, version: int, reason: str = "") -> Pin:
        """Pin a version as it is in the store now, and return the pin.

        Raises `Missing` when the version is not in the store, `ReadOnly` where this process may not write, and
        `EmaswapError` when the number or the reason is none that a pin can have.
        """
        if not self._files.is_writable():
            raise ReadOnly(f"this process may not write to {self._files.location}")
        try:
            data = read(self._files, manifest_key(version), MAX_MANIFEST_BYTES)
        except Missing:
            there = _ranges([each.version for each in seen(self._files)])
            raise Missing(f"version {version} is not in {self._files.location}: it has {there}") from None
        except (NotAFile, TooLarge, Unreadable):
            digest = None  # an operator may pin what cannot be read yet
        else:
            self._expect_files(data)
            digest = digest_of(data)
        try:
            pin = Pin(version=version, digest=digest, reason=reason, at=datetime.now(UTC))
            written = pin.model_dump_json().encode()
        except ValidationError as error:
            raise EmaswapError(f"there can be no such pin: {in_a_line(error)}") from None
        except PydanticSerializationError:
            raise EmaswapError("there can be no such pin: its reason is no text in UTF-8") from None
        self._files.replace(PIN, written)
        return pin

    def _expect_files(self, data: bytes) -> None:
        """Raise `Missing` when a manifest can be read, and names files that are not there any more."""
        with suppress(BadVersion):
            manifest = Manifest.decode(data)
            for kind, blob in manifest.files():
                if self._files.entry(tensors_key(kind, blob.digest)) is None:
                    raise Missing(
                        f"version {manifest.version} in {self._files.location} cannot be served: its {kind} were pruned"
                    )

    def clear_pin(self) -> None:
        """Remove the pin. Raises `ReadOnly` where this process may not write, `Missing` when there is no store."""
        if not self._files.is_writable():
            raise ReadOnly(f"this process may not write to {self._files.location}")
        self._files.delete(PIN)


def _ranges(versions: list[int]) -> str:
    if not versions:
        return "no version yet"
    return f"{len(versions)} versions from {versions[0]} to {versions[-1]}"
