"""The store: where versions are, each wholly there or not at all."""

from pathlib import Path

from emaswap.errors import StoreError
from emaswap.store.directory import DirectoryStore
from emaswap.store.versions import Store

__all__ = ["DirectoryStore", "Store", "open_store"]


def open_store(location: str | Path) -> Store:
    """Return the store at a directory's path (or a `file://` URL of one). Nothing is touched before it is used."""
    text = str(location)
    if not text:
        raise StoreError("expected the path of a store's directory, got nothing")
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    elif "://" in text:
        raise StoreError(f"cannot open {text!r}: this release reads and writes directories; give a path")
    return DirectoryStore(Path(text))
