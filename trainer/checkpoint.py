"""Training checkpoints: everything a run needs to go on bit-exactly, in one file, without pickle.

A damaged checkpoint is noticed by its digest, and the one before it taken instead. (A version in a store is another
thing: it has the averaged weights alone.)
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
    """Write a checkpoint atomically, and let go of all but the newest two.

    Raises `EmaswapError` when the state holds what cannot be saved, or the folder cannot be written.
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
    """The newest checkpoint that is whole, `None` where there is none.

    Raises `EmaswapError` when there are some and all are damaged: starting over in silence would lose the run.
    """
    found = _found(folder)
    for path in found:
        try:
            return state_file.load(path)
        except BadVersion as error:
            log.warning("skipping the damaged checkpoint %s: %s", path, error)
    if found:
        raise EmaswapError(f"no checkpoint in {folder} is whole; remove them to start over")
    return None


def _found(folder: Path) -> list[Path]:
    """Checkpoints, those of later steps first, and of one step the newest."""
    steps = [(int(match[1]), path) for stem, path in state_file.saved(folder) if (match := _STEM.fullmatch(stem))]
    return [path for _, path in sorted(steps, key=lambda each: each[0], reverse=True)]
