"""Content digests that name their algorithm: `blake3:<hex>` or `sha256:<hex>`."""

import hashlib
from typing import Annotated, Literal, Protocol

from blake3 import blake3
from pydantic import StringConstraints

Algorithm = Literal["blake3", "sha256"]
Digest = Annotated[str, StringConstraints(pattern=r"^(blake3|sha256):[0-9a-f]{64}$")]


class Hasher(Protocol):
    """What both algorithms offer."""

    def update(self, data: bytes | memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


def new_hasher(algorithm: str) -> Hasher:
    """Return a fresh hasher. Raises `ValueError` for an algorithm other than blake3 and sha256."""
    if algorithm == "blake3":
        return blake3()
    if algorithm == "sha256":
        return hashlib.sha256()
    raise ValueError(f"unknown digest algorithm {algorithm!r}: expected 'blake3' or 'sha256'")


def algorithm_of(digest: str) -> str:
    """Return the algorithm that a digest names."""
    return digest.partition(":")[0]


def digest_of(data: bytes, algorithm: Algorithm = "blake3") -> Digest:
    """Return the digest of bytes in memory."""
    hasher = new_hasher(algorithm)
    hasher.update(data)
    return f"{algorithm}:{hasher.hexdigest()}"


def stem_of(digest: Digest) -> str:
    """Return the digest as a file name without its suffix: a colon is not portable in one."""
    return digest.replace(":", "-")
