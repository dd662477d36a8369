"""Bearer tokens: who may give orders, and where that is wanted, who may ask for predictions."""

import hmac
from pathlib import Path

from emaswap import EmaswapError

_MIN_BYTES = 8


class Token:
    """A secret that a client has to send as `Authorization: Bearer TOKEN`. It never shows itself."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    def read(cls, file: Path | None, what: str) -> "Token | None":
        """Return the token in a file, without the white space around it; `None` without a file.

        Raises `EmaswapError`, which says `what` token it was to be, when it cannot be read or is too short to be one.
        """
        if file is None:
            return None
        try:
            secret = file.read_bytes().strip()
        except OSError as error:
            raise EmaswapError(f"cannot read the {what} token file {file}: {error.strerror}") from error
        if len(secret) < _MIN_BYTES:
            raise EmaswapError(f"the {what} token in {file} is shorter than {_MIN_BYTES} bytes")
        return cls(secret)

    def is_in(self, authorization: bytes) -> bool:
        """Return whether the value of an `Authorization` header carries the token, in a time that tells nothing of it."""
        scheme, _, secret = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(secret.strip(), self._secret)
