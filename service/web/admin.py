"""What operators may do: pin, unpin, refresh. A bearer token guards it; without a token file it is off."""

import asyncio
import shlex
import time
from collections.abc import Callable
from typing import Any

from emaswap import BadVersion, Missing, ReadOnly, Store, StoreError
from service.control.conductor import OVERRULED, Conductor
from service.control.lane import Blocked, Hung, Lane
from service.control.lifecycle import State
from service.refusal import Code, Refusal
from service.web.schemas import PinState
from service.web.token import Token

_ORDER_TIMEOUT_S = 30.0
_TICK_S = 0.25


class Admin:
    """Checks the operators' token, and writes their orders into the store, where they hold for every replica."""

    def __init__(
        self, store: Store, conductor: Conductor[Any], token: Token | None, draining: Callable[[], bool]
    ) -> None:
        """Without a `token`, operators can do nothing here. While it is `draining`, nothing is waited for."""
        self._store = store
        self._conductor = conductor
        self._token = token
        self._draining = draining
        self._lane = Lane("emaswap-orders")
        self._looking: set[asyncio.Task[float | None]] = set()

    def authorize(self, authorization: bytes) -> None:
        """Raise `Refusal` unless the `Authorization` header, empty without one, carries the token."""
        if self._token is None:
            raise Refusal(Code.ADMIN_IS_OFF, "start the service with --admin-token-file FILE to turn this on")
        if not self._token.is_in(authorization):
            raise Refusal(
                Code.UNAUTHORIZED, "expected the header Authorization: Bearer TOKEN with the operators' token"
            )

    async def pin(self, version: int, reason: str) -> PinState:
        """Pin a version, and wait for a while until it is live (or turned out not to be servable)."""
        if self._is_rejected(version):
            await self._conductor.settle(thorough=True)  # it may be another by now
        record = self._conductor.standing.record(version)
        if record and self._is_rejected(version):
            raise Refusal(
                Code.VERSION_WAS_REJECTED, f"version {version} was rejected: {record.reason}: {record.detail}"
            )
        command = f"emaswap pin --store {shlex.quote(self._store.location)} {version}"
        await self._order(lambda: self._store.orders.set_pin(version, reason), command)
        return await self.refresh()

    async def unpin(self) -> PinState:
        """Remove the pin, and wait until the newest version is live."""
        await self._order(self._store.orders.clear_pin, f"emaswap unpin --store {shlex.quote(self._store.location)}")
        return await self.refresh()

    async def refresh(self) -> PinState:
        """Look at the store now rather than at the next poll, and tell how things stand then, or after a while."""
        looking = asyncio.create_task(self._conductor.settle(thorough=True), name="refresh")
        self._looking.add(looking)
        looking.add_done_callback(self._looking.discard)
        # What loads just now may take long or hang; the order holds all the same.
        until = time.monotonic() + _ORDER_TIMEOUT_S
        while not looking.done() and not self._draining() and time.monotonic() < until:
            await asyncio.wait({looking}, timeout=_TICK_S)
        return PinState.of(self._conductor.standing)

    def close(self) -> None:
        """Let the thread end; do not wait for an order that is under way."""
        self._lane.close()

    def _is_rejected(self, version: int) -> bool:
        record = self._conductor.standing.record(version)
        return record is not None and record.state is State.REJECTED and record.reason not in OVERRULED

    async def _order(self, order: Callable[[], object], command: str) -> None:
        try:
            await self._lane.run(lambda: _carry_out(order, self._store), _ORDER_TIMEOUT_S)
        except Missing as error:
            raise Refusal(Code.UNKNOWN_VERSION, str(error)) from None
        except ReadOnly as error:
            raise Refusal(Code.STORE_IS_READ_ONLY, f"{error}; where one may, run: {command}") from None
        except (StoreError, BadVersion, Hung, Blocked) as error:
            raise Refusal(Code.STORE_UNREACHABLE, f"the order could not be written: {error}") from None


def _carry_out(order: Callable[[], object], store: Store) -> None:
    try:
        writable = store.is_writable()
    except Missing as error:  # it is the store itself that is not there
        raise StoreError(str(error)) from None
    if not writable:
        raise ReadOnly("this service may not write the store")
    order()
