"""What operators may do: pin, unpin, refresh. A bearer token guards it; without a token file it is off."""

import hmac
import shlex
from collections.abc import Callable
from pathlib import Path

from emaswap import EmaswapError, Missing, ReadOnly, Reason, StoreError
from service.control.lifecycle import History, State
from service.control.watcher import Watcher
from service.refusal import Code, Refusal
from service.web.schemas import PinState

_MIN_TOKEN_BYTES = 8


class Admin:
    """Checks the operators' token, and writes the pin into the store, where it holds for every replica."""

    def __init__(self, watcher: Watcher, history: History, token: bytes | None) -> None:
        self._watcher = watcher
        self._history = history
        self._token = token

    def authorize(self, authorization: str | None) -> None:
        """Raises `Refusal` unless the `Authorization` header carries the token."""
        if self._token is None:
            raise Refusal(Code.ADMIN_IS_OFF, "start the service with --admin-token-file FILE to turn this on")
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode("latin-1"), self._token):
            raise Refusal(
                Code.UNAUTHORIZED, "expected the header Authorization: Bearer TOKEN with the operators' token"
            )

    async def pin(self, version: int, reason: str) -> PinState:
        """Pin a version, and wait until it is live (or turned out not to be servable)."""
        await self._watcher.look()
        record = self._history.get(version)
        # A stale term is no fault of the version's own: an operator may overrule it.
        if record and record.state is State.REJECTED and record.reason is not Reason.STALE_TERM:
            raise Refusal(
                Code.VERSION_WAS_REJECTED, f"version {version} was rejected: {record.reason}: {record.detail}"
            )
        store = self._watcher.store
        await self._write(
            lambda: store.orders.set_pin(version, reason),
            f"emaswap pin --store {shlex.quote(store.location)} {version}",
        )
        return await self.refresh()

    async def unpin(self) -> PinState:
        """Remove the pin, and wait until the newest version is live."""
        store = self._watcher.store
        await self._write(store.orders.clear_pin, f"emaswap unpin --store {shlex.quote(store.location)}")
        return await self.refresh()

    async def refresh(self) -> PinState:
        """Look at the store now rather than at the next poll."""
        await self._watcher.look()
        live = self._watcher.slot.current
        return PinState(pin=self._watcher.pin, live=live.version if live else None, status=self._watcher.status)

    async def _write(self, change: Callable[[], object], command: str) -> None:
        store = self._watcher.store
        try:
            if not await self._watcher.on_thread(store.is_writable):
                raise ReadOnly("this service may not write the store")
        except ReadOnly as error:
            raise Refusal(Code.STORE_IS_READ_ONLY, f"{error}; where one may, run: {command}") from None
        except StoreError as error:
            raise Refusal(Code.STORE_UNREACHABLE, str(error)) from None
        try:
            await self._watcher.on_thread(change)
        except Missing as error:
            raise Refusal(Code.UNKNOWN_VERSION, str(error)) from None
        except ReadOnly as error:
            raise Refusal(Code.STORE_IS_READ_ONLY, f"{error}; where one may, run: {command}") from None
        except StoreError as error:
            raise Refusal(Code.STORE_UNREACHABLE, str(error)) from None


def read_token(file: Path | None) -> bytes | None:
    """The token in a file, without the white space around it. Raises `EmaswapError` when it is too short to be one."""
    if file is None:
        return None
    try:
        token = file.read_bytes().strip()
    except OSError as error:
        raise EmaswapError(f"cannot read the admin token file {file}: {error.strerror}") from error
    if len(token) < _MIN_TOKEN_BYTES:
        raise EmaswapError(f"the admin token in {file} is shorter than {_MIN_TOKEN_BYTES} bytes")
    return token
