"""A file beside a framework's checkpoint, without pickle: a nested state, its tensors in the safetensors format.

The digest is in the file's name, so that damage is noticed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from emaswap import weights
from emaswap.digest import stem_of
from emaswap.durable import sync_folder, written
from emaswap.errors import EmaswapError
from emaswap.weights import Blob

_TENSOR = "__tensor__"


def save(folder: Path, stem: str, state: Mapping[str, Any]) -> Path:
    """Write `<stem>.<digest>.safetensors` into a folder, in place of an older one.

    Raises `EmaswapError` when the folder cannot be written. Keys of the state are text, and tuples come back as lists.
    """
    tensors: dict[str, Tensor] = {}

    def put_aside(value: object) -> dict[str, str]:
        if not isinstance(value, Tensor):
            raise EmaswapError(f"a {type(value).__name__} cannot be saved beside a checkpoint")
        name = str(len(tensors))
        tensors[name] = value.detach()
        return {_TENSOR: name}

    metadata = {"state": json.dumps(state, default=put_aside)}
    try:
        older = _found(folder, stem)
        with written(folder, lambda file: weights.write(file, tensors, metadata=metadata)) as (part, blob):
            path = folder / f"{stem}.{stem_of(blob.digest)}.safetensors"
            part.replace(path)
            sync_folder(folder)
        for other in older:
            if other != path:
                other.unlink()
    except OSError as error:
        raise EmaswapError(f"cannot save the average in {folder}: {error.strerror}") from error
    return path


def load(folder: Path, stem: str) -> dict[str, Any] | None:
    """What `save` wrote into a folder; `None` where there is nothing. Raises `BadVersion` when it is damaged."""
    found = _found(folder, stem)
    if not found:
        return None
    path = max(found, key=lambda path: path.stat().st_mtime_ns)
    digest = path.suffixes[-2].removeprefix(".").replace("-", ":", 1)
    with path.open("rb", buffering=0) as file:
        read = weights.read(file, Blob(digest, path.stat().st_size))
    state: dict[str, Any] = json.loads(
        read.metadata["state"],
        object_hook=lambda mapping: read.tensors[mapping[_TENSOR]] if _TENSOR in mapping else mapping,
    )
    return state


def _found(folder: Path, stem: str) -> list[Path]:
    return list(folder.glob(f"{stem}.blake3-*.safetensors"))
