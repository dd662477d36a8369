"""Digests that name their algorithm."""

import hashlib

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from emaswap.files.digest import Algorithm, Digest, algorithm_of, digest_of, new_hasher, stem_of

ALGORITHMS: list[Algorithm] = ["blake3", "sha256"]
HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("algorithm", "digest"),
    [
        ("blake3", "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
        ("sha256", "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    ],
)
def test_the_digest_of_nothing_is_the_published_one(algorithm: Algorithm, digest: Digest) -> None:
    """Each algorithm is the one of its name: it agrees with the published digest of no bytes."""
    assert digest_of(b"", algorithm) == digest


@given(st.binary())
def test_a_digest_is_the_algorithms_own(data: bytes) -> None:
    """A digest is its algorithm's name and the lower-case hex that the algorithm gives; blake3 is the default."""
    assert digest_of(data) == digest_of(data, "blake3") == f"blake3:{blake3(data).hexdigest()}"
    assert digest_of(data, "sha256") == f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(st.lists(st.binary()))
def test_bytes_may_be_digested_piece_by_piece(algorithm: Algorithm, pieces: list[bytes]) -> None:
    """How bytes are cut into pieces makes no difference."""
    hasher = new_hasher(algorithm)
    for piece in pieces:
        hasher.update(memoryview(piece))
    assert f"{algorithm}:{hasher.hexdigest()}" == digest_of(b"".join(pieces), algorithm)


@pytest.mark.parametrize("name", ["md5", "", "BLAKE3", "sha256 "])
def test_another_algorithm_is_refused(name: str) -> None:
    """An algorithm that is not known is an error that names the known ones."""
    with pytest.raises(ValueError, match="expected 'blake3' or 'sha256'"):
        new_hasher(name)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_digest_names_its_algorithm(algorithm: Algorithm) -> None:
    """The algorithm can be read off the digest, and what is made is what the type accepts."""
    digest = digest_of(b"weights", algorithm)
    assert algorithm_of(digest) == algorithm
    assert TypeAdapter(Digest).validate_python(digest) == digest


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_stem_is_portable_in_a_file_name(algorithm: Algorithm) -> None:
    """A file name made of a digest has a dash for the colon, and nothing that could be a path."""
    stem = stem_of(digest_of(b"", algorithm))
    assert stem.startswith(f"{algorithm}-")
    assert stem.replace("-", "").isalnum()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(HEX, id="no algorithm"),
        pytest.param(f"md5:{HEX}", id="unknown algorithm"),
        pytest.param(f"blake3:{HEX[1:]}", id="too short"),
        pytest.param(f"blake3:{HEX}0", id="too long"),
        pytest.param(f"blake3:{HEX.upper()}", id="upper case"),
        pytest.param(f"blake3:{HEX}\n", id="newline after it"),
        pytest.param(f" blake3:{HEX}", id="space before it"),
        pytest.param(f"blake3:../{HEX[3:]}", id="a path"),
        pytest.param(f"blake3:{chr(0x660) * 64}", id="digits that are not ASCII"),
        pytest.param(f"blake3:{HEX[:-1]}\0", id="NUL"),
        pytest.param("", id="empty"),
    ],
)
def test_text_that_is_no_digest_is_refused(text: str) -> None:
    """The type accepts nothing but a known algorithm, a colon and 64 lower-case hex digits."""
    with pytest.raises(ValidationError):
        TypeAdapter(Digest).validate_python(text)
