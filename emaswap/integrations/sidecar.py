"""An average's state in a file next to a framework's checkpoint: one file per stem."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emaswap.errors import EmaswapError
from emaswap.files import state_file


def save(folder: Path, stem: str, state: Mapping[str, Any]) -> Path:
    """Write the state into a folder, and delete an older file of this stem.

    Raises `EmaswapError` when the state holds a value that cannot be saved, or the folder cannot be written.
    """
    try:
        older = _found(folder, stem)
        path = state_file.save(folder, stem, state)
        for other in older:
            if other != path:
                other.unlink()
    except OSError as error:
        raise EmaswapError(f"cannot save the average in {folder}: {error.strerror}") from error
    return path


def load(folder: Path, stem: str) -> dict[str, Any] | None:
    """Return what `save` wrote into a folder, or `None` if there is nothing. Raises `BadVersion` if it is damaged."""
    return next((state_file.load(path) for path in _found(folder, stem)), None)


def _found(folder: Path, stem: str) -> list[Path]:
    return [path for found, path in state_file.saved(folder) if found == stem]
