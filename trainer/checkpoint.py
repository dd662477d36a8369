"""Training checkpoints: everything a run needs to go on bit-exactly, in one file, without pickle.

Tensors are stored as a safetensors file and everything else as JSON in its metadata. The digest is in the file's
name, so a damaged checkpoint is noticed and the one before it taken instead. (A version in a store is another thing:
it has the averaged weights alone.)
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from emaswap import BadVersion, EmaswapError, weights
from emaswap.digest import stem_of
from emaswap.durable import is_part, sync_folder, written
from emaswap.weights import Blob

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})\.(blake3|sha256)-([0-9a-f]{64})\.safetensors")
_KEEP = 2

State = dict[str, Any]


def save(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint atomically, and let go of all but the newest two.

    Raises `EmaswapError` when the state holds what cannot be saved, or the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    metadata = {"state": json.dumps(_pack(state, "", tensors))}
    try:
        return _write(folder, step, tensors, metadata)
    except OSError as error:
        raise EmaswapError(f"cannot save a checkpoint in {folder}: {error.strerror}") from error


def _write(folder: Path, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.iterdir():
        if is_part(stale.name):
            stale.unlink()
    with written(folder, lambda file: weights.write(file, tensors, metadata=metadata)) as (path, blob):
        final = folder / f"step-{step:08d}.{stem_of(blob.digest)}.safetensors"
        path.replace(final)
        sync_folder(folder)
    for old in [path for path in _found(folder) if path != final][_KEEP - 1 :]:
        old.unlink()
    return final


def load(folder: Path) -> State | None:
    """The newest checkpoint that is whole, `None` where there is none.

    Raises `EmaswapError` when there are some and all are damaged: starting over in silence would lose the run.
    """
    found = _found(folder)
    for path in found:
        _, algorithm, digest = _parts(path)
        try:
            with path.open("rb", buffering=0) as file:
                read = weights.read(file, Blob(f"{algorithm}:{digest}", path.stat().st_size))
            state: State = _unpack(json.loads(read.metadata["state"]), read.tensors)
            return state
        except BadVersion as error:
            log.warning("skipping the damaged checkpoint %s: %s", path, error)
    if found:
        raise EmaswapError(f"no checkpoint in {folder} is whole; remove them to start over")
    return None


def _found(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (_parts(path)[0], path.stat().st_mtime_ns), reverse=True)


def _parts(path: Path) -> tuple[int, str, str]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), match[2], match[3]


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A nested state as JSON, its tensors put aside; JSON itself would turn tuples to lists and number keys to text."""
    if isinstance(value, Tensor):
        unique = f"{len(tensors)}{name}"  # keys 1 and "1" look alike in a name
        tensors[unique] = value
        return {"tensor": unique}
    if isinstance(value, Mapping):
        if odd := [key for key in value if not (key is None or isinstance(key, (bool, int, float, str)))]:
            raise EmaswapError(f"a checkpoint cannot hold {name}, which has a {type(odd[0]).__name__} for a key")
        return {"mapping": [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise EmaswapError(f"a checkpoint cannot hold {name}, a {type(value).__name__}")


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(packed, dict):
        return packed
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "mapping":
        return {key: _unpack(item, tensors) for key, item in value}
    items = [_unpack(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items
