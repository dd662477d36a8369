"""The conductor: does what the policy says, and keeps account of it.

It belongs to the event loop, which alone writes its records; everything that blocks runs on lanes.
"""

import asyncio
import contextlib
import gc
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Generic

import structlog

from emaswap import BadVersion, Identity, Missing, Reason, StoreError
from emaswap.errors import describe
from service.control.blocking import Blocking
from service.control.guard import Guard
from service.control.lane import Blocked, Hung
from service.control.lifecycle import LOADING, History, State
from service.control.loader import Loader
from service.control.metrics import ControlMetrics
from service.control.policy import Known, Load, decide
from service.control.quarantine import Quarantine, Stamps
from service.control.standing import Standing
from service.control.survey import Survey
from service.refusal import shorten
from service.serving.servable import Served
from service.serving.slot import Live, Slot

log = structlog.get_logger("emaswap.service")

# How long one look at the store serves while several versions are tried.
_LOOK_LASTS_S = 1.0
_LOADS_PER_TURN = 50
# After a turn that came to no end, the rest is this many times what it took.
_REST_PER_WORK = 4.0
_LONGEST_REST_S = 5.0
_NOTABLE_SKEW_S = 1.0
# Reasons that are no fault of a version's own bytes: an operator's pin overrules them.
OVERRULED = frozenset({Reason.STALE_TERM, Reason.OUT_OF_LINE})


class Conductor(Generic[Live]):
    """Keeps a slot at the version that the store's state calls for."""

    def __init__(
        self,
        slot: Slot[Live],
        loader: Loader[Live],
        metrics: ControlMetrics,
        *,
        poll_s: float,
        load_timeout_s: float,
        guard_s: float = 0.0,
    ) -> None:
        """Load from the loader's store. A load may take `load_timeout_s` seconds; `poll_s` is between looks.

        For `guard_s` seconds after a version went live, the one before is kept ready to take its place.
        """
        self._slot = slot
        self._guard = Guard(slot, guard_s)
        self._blocking = Blocking(loader, load_timeout_s=load_timeout_s)
        self._metrics = metrics
        self._history = History()
        self._quarantine = Quarantine(poll_s=poll_s)
        self._turn = asyncio.Lock()
        self._standing = Standing()
        self._by_order: Identity | None = None
        metrics.hung_loads.set_function(lambda: self._blocking.hung_loads)
        metrics.know(self._history.newest_first)

    @property
    def standing(self) -> Standing:
        """How things stand now."""
        return replace(self._standing, live=self._slot.current, records=self._history.newest_first())

    async def settle(self, *, thorough: bool = False) -> float | None:
        """Look at the store, and do what the policy says until it says to stay, or for a bounded number of loads.

        With `thorough`, everything that was rejected or failed for now is looked at again. Returns the seconds after
        which to come again before the next poll, `None` when there is no reason to. Never raises for a bad version.
        """
        async with self._turn:
            try:
                return await self._settle(thorough=thorough)
            except (StoreError, Hung, Blocked) as error:
                self._metrics.store_errors.inc()
                if isinstance(error, Missing) and self._slot.current is not None:
                    self._standing = replace(self._standing, in_store=False)
                    self._metrics.saw(self.standing)
                said = str(error) if isinstance(error, StoreError) else f"the store does not answer: {error}"
                self._conclude(said)
            except Exception as error:  # whatever it is, the live version keeps answering and the watch goes on
                self._metrics.store_errors.inc()
                said = f"the look at the store failed: {describe(error)}"
                if said != self._standing.status:
                    log.exception("the look at the store failed")
                self._conclude(said)
            return None

    def give_up(self, broken: Live, error: BadVersion) -> None:
        """Reject a version that turned out broken while it answered.

        Where it was live, the one before is live again if it was kept ready; else nothing is until `settle` has found
        another.
        """
        identity = broken.manifest.identity
        self._slot.withdraw(broken)
        record = self._history.get(identity)
        if record is not None and record.state is not State.REJECTED:
            self._quarantine.reject(identity.version, error, record.stamp, None)
            self._note_rejection(identity, error, record.timings_s)
            self._note_return()

    def close(self) -> None:
        """Let the threads end; do not wait for work that is under way."""
        self._blocking.close()

    # -- looking ------------------------------------------------------------------------------------------------------

    async def _settle(self, *, thorough: bool) -> float | None:
        if thorough:
            self._quarantine.hasten()
        began = looked_at = time.monotonic()
        found = await self._look(thorough=thorough)
        for loads in range(_LOADS_PER_TURN):
            action = decide(self._known(found))
            if not isinstance(action, Load):
                self._conclude(action.why, about=action.about, quietly=loads > 0)
                return self._next_retry_s()
            self._standing = replace(self._standing, status=f"loading version {action.version}")
            outcome = await self._load(action.version, found)
            out_of_date = time.monotonic() - looked_at > _LOOK_LASTS_S
            if outcome is _Outcome.GONE or (outcome is _Outcome.FAILED and out_of_date):
                found = await self._look()
                looked_at = time.monotonic()
        return min(_REST_PER_WORK * (time.monotonic() - began), _LONGEST_REST_S)

    async def _look(self, *, thorough: bool = False) -> Survey:
        """Look at the store, and forget what it shows to be out of date."""
        live = self._slot.current
        identity = live.manifest.identity if live else None
        record = self._history.get(identity) if identity else None
        to_check = self._quarantine.to_check(above=self._above(), thorough=thorough)
        rejected = frozenset(self._quarantine.rejections)
        found = await self._blocking.survey(identity, record.stamp if record else None, rejected, to_check)
        if identity and found.live_stamp:
            self._history.restamp(identity, found.live_stamp)
        self._history.discover(found.manifests)
        self._quarantine.compare(found.manifests)
        for version, stamps in found.stamps.items():
            if self._quarantine.checked(version, stamps):
                self._reconsider(version)
        pin = found.look.pin
        if pin and live and identity and pin.names(identity):
            self._slot.trust(live.version)
        if pin and (rejection := self._quarantine.rejections.get(pin.version)) and rejection.reason in OVERRULED:
            self._quarantine.release(pin.version)
            self._reconsider(pin.version)
        if identity and identity == self._by_order and pin is None and found.live_stamp:
            await self._end_exception(identity, found)
        in_store = None if self._slot.current is None else found.live_stamp is not None
        self._standing = replace(self._standing, pin=pin, newest=found.look.newest, in_store=in_store)
        self._metrics.saw(self.standing)
        return found

    async def _end_exception(self, identity: Identity, found: Survey) -> None:
        """Reject a live version that only the pin that is gone had let go live. It answers until another does."""
        self._by_order = None
        try:
            await self._blocking.check_place(identity, found.look)
        except BadVersion as error:
            self._quarantine.reject(identity.version, error, found.manifests.get(identity.version), None)
            log.warning("version not in line", version=identity.version, reason=error.reason, detail=error.detail)

    def _above(self) -> int:
        """Return the number above which versions can go live without a pin."""
        live = self._slot.current
        return live.version if live and self._standing.in_store and not self._is_kept_out() else 0

    def _next_retry_s(self) -> float | None:
        pin = self._standing.pin
        return self._quarantine.next_retry_s(above=self._above(), pinned=pin.version if pin else None)

    def _reconsider(self, version: int) -> None:
        record = self._history.get(self._history.holder(version))
        if record is not None and record.state is State.REJECTED:
            self._history.enter(record.identity, State.DISCOVERED)

    def _known(self, found: Survey) -> Known:
        live = self._slot.current
        in_store = bool(self._standing.in_store)
        pin = found.look.pin
        pin_is_live = (
            live is not None
            and pin is not None
            and pin.names(live.manifest.identity)
            and (in_store or pin.digest is not None or found.look.get(pin.version) is None)
        )
        return Known(
            live=live.version if live and in_store else None,
            versions=found.look.numbers,
            pinned=pin.version if pin else None,
            rejected=frozenset(self._quarantine.rejections),
            waiting=self._quarantine.waiting(),
            stray=live.version if live and not in_store else None,
            pin_is_stray=pin_is_live and not in_store,
            pin_is_foreign=found.pin_is_foreign and not pin_is_live,
        )

    def _conclude(self, status: str, *, about: int | None = None, quietly: bool = False) -> None:
        """Note where things stand, with a line in the log unless the same status was just logged."""
        why = self._quarantine.why(about) if about is not None else None
        if why:
            status = f"{status}: {why}"
        if status != self._standing.status and not quietly:
            log.info("watching", status=status)
        self._standing = replace(self._standing, status=status)

    # -- loading ------------------------------------------------------------------------------------------------------

    async def _load(self, version: int, found: Survey) -> "_Outcome":
        """Load a version and let it go live, or note why not. Return how it ended."""
        attempt = _Attempt(self._history.holder(version), found.manifests.get(version))
        try:
            servable = await self._prove(attempt, found)
        except BadVersion as error:
            self._quarantine.reject(version, error, attempt.stamp, attempt.stamps)
            self._note_rejection(attempt.identity, error, attempt.timings_s)
            return _Outcome.FAILED
        except Hung as error:
            self._set_back(attempt, f"loading it is given up: {error}", hangs=error.hangs)
            return _Outcome.FAILED
        except Missing as error:
            self._set_back(attempt, str(error))
            return _Outcome.GONE
        except (Blocked, StoreError, MemoryError) as error:
            self._set_back(attempt, str(error) or "out of memory")
            return _Outcome.FAILED
        except Exception as error:  # whatever it is, other versions may load
            log.exception("loading failed", version=version)
            self._set_back(attempt, describe(error))
            return _Outcome.FAILED
        finally:
            attempt.over = True
        self._go_live(servable, attempt.timings_s)
        return _Outcome.LIVE

    async def _prove(self, attempt: "_Attempt", found: Survey) -> Live:
        loop = asyncio.get_running_loop()
        candidate = await self._blocking.read(attempt.identity.version)
        manifest = candidate.manifest
        live = self._slot.current
        if live is not None and manifest.identity == live.manifest.identity:
            raise Missing(f"the store changed under the look: version {manifest.version} there is the live one")
        attempt.identity, attempt.stamps = manifest.identity, candidate.stamps
        self._history.identify(
            manifest.identity, attempt.stamp, digest=manifest.weights.digest, step=manifest.training.step
        )

        def enter(state: State) -> None:
            loop.call_soon_threadsafe(self._enter, attempt, state)

        return await self._blocking.load(
            candidate, found.look, live=self._slot.current, enter=enter, timings_s=attempt.timings_s
        )

    def _enter(self, attempt: "_Attempt", state: State) -> None:
        if not attempt.over:  # what was given up may go on for a while
            self._history.enter(attempt.identity, state)

    def _set_back(self, attempt: "_Attempt", why: str, *, hangs: Callable[[], bool] | None = None) -> None:
        version = attempt.identity.version
        if self._quarantine.why(version) != why:
            log.warning("version failed for now", version=version, why=why, timings_s=attempt.timings_s)
        self._quarantine.set_back(version, why, attempt.stamp, hangs=hangs)
        self._metrics.load_retries.inc()
        record = self._history.get(attempt.identity)
        if record is not None and record.state in LOADING:
            self._history.enter(attempt.identity, State.DISCOVERED, timings_s=attempt.timings_s)

    def _note_rejection(self, identity: Identity, error: BadVersion, timings_s: Mapping[str, float]) -> None:
        self._metrics.rejected.labels(reason=error.reason).inc()
        self._history.enter(identity, State.REJECTED, reason=error.reason, detail=error.detail, timings_s=timings_s)
        live = self._slot.current
        log.warning(
            "version rejected",
            version=identity.version,
            reason=str(error.reason),
            detail=shorten(error.detail),
            timings_s=dict(timings_s),
            live=live.version if live else None,
        )

    def _go_live(self, servable: Live, timings_s: Mapping[str, float]) -> None:
        # An order holds whatever happens, and what is not in the store any more is nothing to return to.
        pin = self._standing.pin
        may_return = pin is None and bool(self._standing.in_store) and not self._is_kept_out()
        self._by_order = servable.manifest.identity if pin else None
        before = self._guard.swap(servable, may_return=may_return)
        if before is None:
            # What is there by now stays: let the cycle collector, which stops everything else, never look at it again.
            gc.collect()
            gc.freeze()
        if before is not None:
            self._history.enter(before.manifest.identity, State.PREVIOUS)
            loop = asyncio.get_running_loop()
            weakref.finalize(before, _call_soon, loop, self._retire, before.manifest.identity).atexit = False
        self._history.enter(servable.manifest.identity, State.LIVE, timings_s=timings_s)
        self._standing = replace(self._standing, in_store=True)
        self._metrics.went_live(servable, timings_s)
        self._note_skew(servable, before)
        log.info(
            "version live",
            version=servable.version,
            digest=servable.digest,
            step=servable.manifest.training.step,
            previous=before.version if before else None,
            publish_to_served_s=round(servable.publish_to_served_s, 4),
            drift=servable.drift,
            timings_s=dict(timings_s),
        )

    def _is_kept_out(self) -> bool:
        """Return whether the live version would not be let in again."""
        live = self._slot.current
        return live is not None and live.version in self._quarantine.rejections

    def _note_return(self) -> None:
        """Note that the version before is live again, if it is."""
        live = self._slot.current
        record = self._history.get(live.manifest.identity) if live else None
        if live is None or record is None or record.state is not State.PREVIOUS:
            return
        self._history.enter(live.manifest.identity, State.LIVE)
        self._metrics.rollbacks.inc()
        log.warning("version live again", version=live.version, digest=live.digest)

    def _note_skew(self, servable: Served, before: Served | None) -> None:
        skew_s = servable.manifest.skew_s(servable.loaded_at)
        was_s = before.manifest.skew_s(before.loaded_at) if before else 0.0
        if skew_s > _NOTABLE_SKEW_S >= was_s:
            log.warning(
                "the publisher's clock is ahead of this one",
                version=servable.version,
                seconds=round(skew_s, 3),
                help="set both clocks by NTP; until then the ages of versions cannot be told",
            )

    def _retire(self, identity: Identity) -> None:
        record = self._history.get(identity)
        if record is not None and record.state is State.PREVIOUS:  # a version can be live again by then
            self._history.enter(identity, State.RETIRED)


class _Outcome(Enum):
    """How a load ended. A version that is gone was pruned: then others of the same look may be gone, too."""

    LIVE = auto()
    FAILED = auto()
    GONE = auto()


@dataclass
class _Attempt:
    """One try to load a version."""

    identity: Identity
    stamp: str | None
    stamps: Stamps | None = None
    timings_s: dict[str, float] = field(default_factory=dict)
    over: bool = False


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[Identity], None], identity: Identity) -> None:
    """Have the event loop do something. Called when an object is collected, on whichever thread that happens."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: the service has ended
        loop.call_soon_threadsafe(call, identity)
