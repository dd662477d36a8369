"""Training checkpoints: everything a run needs to resume bit-exactly, in one file, without pickle.

The digest shows when a checkpoint is damaged, and the previous one is used instead. (A version in a store is something
else: it holds only the averaged weights.)
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emaswap import BadVersion, EmaswapError
from emaswap.files import state_file
from emaswap.files.durable import is_part
from emaswap.files.state_file import State

log = logging.getLogger(__name__)

_STEM = re.compile(r"step-(\d{8,})")
_KEEP = 2


def save(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint atomically, and delete all but the newest two.

    Raises `EmaswapError` when the state holds a value that cannot be saved, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.iterdir():
            if is_part(stale.name):
                stale.unlink()
        final = state_file.save(folder, f"step-{step:08d}", state)
        for old in [path for path in _found(folder) if path != final][_KEEP - 1 :]:
            old.unlink()
    except OSError as error:
        raise EmaswapError(f"cannot save a checkpoint in {folder}: {error.strerror}") from error
    return final


def load(folder: Path) -> State | None:
    """Return the newest intact checkpoint, or `None` if there are no checkpoints.

    Raises `EmaswapError` when all checkpoints are damaged: to start over silently would lose the run.
    """
    found = _found(folder)
    for path in found:
        try:
            return state_file.load(path)
        except BadVersion as error:
            log.warning("skipping the damaged checkpoint %s: %s", path, error)
    if found:
        raise EmaswapError(f"all checkpoints in {folder} are damaged; remove them to start over")
    return None


def _found(folder: Path) -> list[Path]:
    """Return the checkpoints, latest step first, and for one step the newest file first."""
    steps = [(int(match[1]), path) for stem, path in state_file.saved(folder) if (match := _STEM.fullmatch(stem))]
    return [path for _, path in sorted(steps, key=lambda each: each[0], reverse=True)]
