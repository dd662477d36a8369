"""A nested state in one file, without pickle: its tensors in the safetensors format, all else as JSON in the metadata.

The digest is in the file's name, so that damage is noticed. This module knows nothing of what the state is of.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from emaswap.errors import EmaswapError
from emaswap.files import tensor_file
from emaswap.files.digest import stem_of
from emaswap.files.durable import sync_folder, written
from emaswap.files.tensor_file import Blob

_NAME = re.compile(r"(.+)\.(blake3|sha256)-([0-9a-f]{64})\.safetensors", re.DOTALL)

State = dict[str, Any]


def save(folder: Path, stem: str, state: Mapping[str, Any]) -> Path:
    """Write `<stem>.<digest>.safetensors` into a folder: wholly on disk before it has that name.

    Raises `EmaswapError` when the state holds what cannot be saved, `OSError` when the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    metadata = {"state": json.dumps(_pack(state, "", tensors))}
    with written(folder, lambda file: tensor_file.write(file, tensors, metadata=metadata)) as (part, blob):
        path = folder / f"{stem}.{stem_of(blob.digest)}.safetensors"
        part.replace(path)
        sync_folder(folder)
    return path


def load(path: Path) -> State:
    """Return what `save` wrote, its types and values as they were. Raises `BadVersion` when the file is damaged."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    with path.open("rb", buffering=0) as file:
        read = tensor_file.read(file, Blob(digest=f"{match[2]}:{match[3]}", size=path.stat().st_size))
    state: State = _unpack(json.loads(read.metadata["state"]), read.tensors)
    return state


def saved(folder: Path) -> list[tuple[str, Path]]:
    """Return the stems of the states in a folder with their files, the newest file first; none where there is no folder."""
    if not folder.is_dir():
        return []
    found = [(match[1], path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found, key=lambda each: each[1].stat().st_mtime_ns, reverse=True)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a nested state as JSON, its tensors put aside; JSON alone would turn tuples to lists and number keys to text."""
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
