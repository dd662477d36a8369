"""The names of a store's files. Nobody outside of this room uses them.

versions/00000042.json         the manifest; creating it exclusively is the commit
weights/<digest>.safetensors   immutable, named by content
probes/<digest>.safetensors
CURRENT                        a hint {"version": 42}: never the truth
PIN                            {"version": 41, "digest": ..., "reason": ..., "at": ...} when an operator pinned one
tmp/                           files being written
"""

import re
from typing import Literal

from emaswap.files.digest import Digest, stem_of

Kind = Literal["weights", "probes"]

VERSIONS, TMP = "versions", "tmp"
KINDS: tuple[Kind, ...] = ("weights", "probes")
CURRENT, PIN = "CURRENT", "PIN"
MAX_NOTE_BYTES = 64 << 10

_MANIFEST = re.compile(r"(\d{8,15})\.json")
_TENSORS = re.compile(r"(blake3|sha256)-([0-9a-f]{64})\.safetensors")


def manifest_key(version: int) -> str:
    """Return the key of a version's manifest."""
    return f"{VERSIONS}/{version:08d}.json"


def version_of(name: str) -> int | None:
    """Return the number of the version whose manifest has this file name; `None` if it is not a manifest's name."""
    match = _MANIFEST.fullmatch(name)
    # Only a version's own name counts: 000000099.json is another file than that of version 99.
    return int(match[1]) if match and f"{int(match[1]):08d}" == match[1] and int(match[1]) else None


def tensors_key(kind: Kind, digest: Digest) -> str:
    """Return the key of a tensor file. A valid digest is an algorithm's name and hex, so it cannot lead elsewhere."""
    return f"{kind}/{stem_of(digest)}.safetensors"


def digest_in(name: str) -> Digest | None:
    """Return the digest in a tensor file's name; `None` if it is not such a name."""
    match = _TENSORS.fullmatch(name)
    return f"{match[1]}:{match[2]}" if match else None
