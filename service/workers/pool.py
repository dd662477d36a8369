"""The pool: a supervisor's workers, what each has prepared, and the flip that changes what all of them answer with.

It belongs to the supervisor's event loop. A load is what was read and verified once, and is built by every worker:
first by one alone, since a version may kill the process that builds it.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import structlog

from emaswap import BadVersion, Reason, Short
from service.serving.metrics import Counted
from service.workers.arena import Arena, Arenas
from service.workers.channel import Channel, Message
from service.workers.flip import Flip
from service.workers.fork_server import ForkServer

log = structlog.get_logger("emaswap.service")

_LOOK_EVERY_S = 0.25
# A worker that says nothing for so long hangs as a whole: what hangs in a forward pass alone does not silence it.
_SILENT_S = 2.0
# A look that comes later than this says nothing of the others: the supervisor itself was stopped.
_LATE_S = 1.0
_ANSWER_S = 1.0
_FIRST_PAUSE_S = 0.1
_LAST_PAUSE_S = 10.0
# How long a worker must have lived for its end to be no sign of trouble at the start.
_LIVED_S = 10.0


@dataclass(eq=False)
class Load:
    """A version that was read into an arena once, for the workers to build."""

    number: int
    arena: Arena
    papers: int
    sizes: dict[str, int]
    mapped_by: set["Handle"] = field(default_factory=set)

    @property
    def message(self) -> Message:
        """What tells a worker to build it; the files of arena and papers go along."""
        return {"do": "prepare", "load": self.number, **self.sizes}


@dataclass(eq=False)
class Handle:
    """One worker, as the supervisor sees it."""

    number: int
    pid: int
    pidfd: int
    channel: Channel
    began: float = field(default_factory=time.monotonic)
    serving: bool = False
    asked: dict[int, "asyncio.Future[float | None]"] = field(default_factory=dict)
    counted: dict[str, Any] = field(default_factory=lambda: Counted().state())
    counting: dict[int, "asyncio.Future[None]"] = field(default_factory=dict)

    def has(self, loads: Collection[Load]) -> bool:
        """Return whether it has prepared these loads."""
        return all(load.number in self.asked and _is_right(self.asked[load.number]) for load in loads)

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)


class WorkerPool:
    """The workers of one supervisor."""

    def __init__(
        self,
        flip: Flip,
        fork_server: ForkServer,
        on_broken: Callable[[int, BadVersion], None],
        stand: Callable[[], Message],
    ) -> None:
        """Where a worker finds a load broken, `on_broken` is told its number. `stand` is what workers know of the rest."""
        self.arenas = Arenas()
        self.handles: dict[int, Handle] = {}
        self.ended = Counted()
        self._flip = flip
        self._fork_server = fork_server
        self._on_broken = on_broken
        self._loads: dict[int, Load] = {}
        self._leaving: dict[int, Load] = {}
        self._numbers = itertools.count(1)
        self._pauses = dict.fromkeys(range(flip.workers), 0.0)
        self._stand = stand
        self._told: Message = {}
        self._ending = False
        self._tasks: set[asyncio.Task[None]] = set()

    # -- workers -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the workers, and keep their number. Called on the event loop."""
        self._spawn(self._look_after())
        for number in range(self._flip.workers):
            self._fork(number)

    def end(self) -> None:
        """Let the workers drain, and start no others. May be called from a signal handler."""
        self._ending = True
        for handle in list(self.handles.values()):
            if not handle.channel.send({"do": "drain"}):
                handle.signal(signal.SIGTERM)

    def close(self) -> None:
        """End all workers that are still there."""
        self._ending = True
        for task in self._tasks:
            task.cancel()
        for handle in list(self.handles.values()):
            handle.signal(signal.SIGKILL)
            self._forget(handle)
        self._fork_server.end()

    def tell(self) -> None:
        """Tell the workers how things stand, where that has changed."""
        stand = self._stand()
        if stand != self._told:
            self._told = stand
            for handle in self.handles.values():
                handle.channel.send(stand)

    async def count(self) -> Counted:
        """Return what all workers counted, those that have ended included."""
        if waiting := [self._ask_counts(handle) for handle in self.handles.values()]:
            await asyncio.wait(waiting, timeout=_ANSWER_S)
        total = Counted().add(self.ended.state())
        for handle in self.handles.values():
            total.add(handle.counted)
        return total

    def _ask_counts(self, handle: Handle) -> "asyncio.Future[None]":
        ask = next(self._numbers)
        handle.counting[ask] = future = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: handle.counting.pop(ask, None))
        handle.channel.send({"do": "count", "ask": ask})
        return future

    def _fork(self, number: int) -> None:
        try:
            pid, end = self._fork_server.fork(number)
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            log.error("a worker cannot be started", worker=number, error=str(error))
            self._fork_later(number)
            return
        handle = Handle(number, pid, pidfd, Channel(end))
        self.handles[number] = handle
        self._flip.beat(number)
        handle.channel.listen(
            lambda message, files: self._receive(handle, message, files), lambda: self._lost(handle, "it ended")
        )
        log.info("worker started", worker=number, pid=pid)
        self._spawn(self._welcome(handle))

    async def _welcome(self, handle: Handle) -> None:
        """Have a new worker prepare what the others have, and then let it serve."""
        handle.channel.send(self._stand())
        while not handle.has(self._loads.values()):
            load = next(load for load in self._loads.values() if not handle.has([load]))
            try:
                await self._prepare_in(handle, load)
            except Short:
                if self.handles.get(handle.number) is not handle:
                    return
                await asyncio.sleep(_LOOK_EVERY_S)
                if self._loads.get(load.number) is load:
                    handle.asked.pop(load.number, None)
            except BadVersion as error:
                if self._loads.get(load.number) is load:
                    self._on_broken(load.number, error)
                    await asyncio.sleep(_LOOK_EVERY_S)
        handle.serving = True
        handle.channel.send({"do": "serve"})

    def _lost(self, handle: Handle, why: str) -> None:
        """Start another worker in the place of one that has ended, or is about to."""
        if self.handles.get(handle.number) is not handle:
            return
        handle.signal(signal.SIGKILL)
        self._forget(handle)
        if self._ending:
            return
        log.error("worker lost", worker=handle.number, pid=handle.pid, why=why)
        if time.monotonic() - handle.began > _LIVED_S:
            self._pauses[handle.number] = 0.0
        self._fork_later(handle.number)

    def _forget(self, handle: Handle) -> None:
        del self.handles[handle.number]
        self._flip.leave(handle.number)
        handle.channel.close()
        os.close(handle.pidfd)
        self.ended.add({**handle.counted, "waiting": 0, "in_flight": 0})
        for asked in handle.asked.values():
            if not asked.done():
                asked.set_exception(Short(f"worker {handle.number} ended while it prepared a version"))
        for counting in list(handle.counting.values()):
            counting.cancel()
        for load in [*self._loads.values(), *self._leaving.values()]:
            self._unmapped(handle, load)

    def _fork_later(self, number: int) -> None:
        pause_s = self._pauses[number]
        self._pauses[number] = min(max(2 * pause_s, _FIRST_PAUSE_S), _LAST_PAUSE_S)

        async def fork() -> None:
            await asyncio.sleep(pause_s)
            if not self._ending:
                self._fork(number)

        self._spawn(fork())

    async def _look_after(self) -> None:
        """Replace workers that hang, and keep their counts for when they end."""
        while True:
            slept_at = time.monotonic()
            await asyncio.sleep(_LOOK_EVERY_S)
            if not self._ending and not self._fork_server.is_alive():
                log.error("the fork server has gone, and without it no worker can be replaced; ending")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            if time.monotonic() - slept_at > _LATE_S:
                for number in self.handles:
                    self._flip.beat(number)
            for handle in list(self.handles.values()):
                if self._flip.silent_s(handle.number) > _SILENT_S:
                    self._lost(handle, f"it hangs: no sign of life for {_SILENT_S:g} s")
                elif not handle.counting:
                    self._ask_counts(handle)

    # -- loads -------------------------------------------------------------------------------------------------------

    def next_number(self) -> int:
        """Return a number that no load has had."""
        return next(self._numbers)

    async def prepare(self, load: Load) -> float | None:
        """Have all workers build a load. Return how far its answers are from those of the version before.

        Raises `BadVersion` when a worker finds it wrong, `Short` when one could not build it just now.
        """
        self._loads[load.number] = load
        drift = None
        try:
            while waiting := [handle for handle in self.handles.values() if not handle.has([load])]:
                if len(waiting) == len(self.handles):
                    drift = await self._prepare_in(waiting[0], load)
                else:
                    await asyncio.gather(*(self._prepare_in(handle, load) for handle in waiting))
            if not self.handles:
                raise Short("no worker is running just now")
        except BaseException:
            self.release(load)
            raise
        return drift

    def flip(self, live: int, previous: int) -> None:
        """Have all workers answer with a load, and keep the previous one ready; 0 for none."""
        self.tell()
        self._flip.write(live, previous)

    def release(self, load: Load) -> None:
        """Have the workers drop a load. Its memory is used again once none of them maps it."""
        if self._loads.pop(load.number, None) is None:
            return
        os.close(load.papers)
        self._leaving[load.number] = load
        for handle in self.handles.values():
            if (asked := handle.asked.pop(load.number, None)) is not None:
                handle.channel.send({"do": "drop", "load": load.number})
                if not asked.done():
                    asked.set_exception(Short("it is not wanted any more"))
        self._settle(load)

    async def _prepare_in(self, handle: Handle, load: Load) -> float | None:
        asked = handle.asked.get(load.number)
        if asked is None:
            asked = handle.asked[load.number] = asyncio.get_running_loop().create_future()
            asked.add_done_callback(_look_at)
            load.mapped_by.add(handle)
            if not handle.channel.send(load.message, [load.arena.file, load.papers]):
                self._lost(handle, "it takes no messages")
        return await asyncio.shield(asked)

    def _settle(self, load: Load) -> None:
        if not load.mapped_by and load.number in self._leaving:
            del self._leaving[load.number]
            self.arenas.give_back(load.arena)

    def _unmapped(self, handle: Handle, load: Load) -> None:
        load.mapped_by.discard(handle)
        if load.number in self._leaving:
            self._settle(load)

    # -- what workers say --------------------------------------------------------------------------------------------

    def _receive(self, handle: Handle, message: Message, files: list[int]) -> None:
        for file in files:
            os.close(file)
        load = message.get("load", 0)
        match message["done"]:
            case "prepared" | "rejected" | "short":
                if (asked := handle.asked.get(load)) is not None and not asked.done():
                    _settle_with(asked, message)
            case "unmapped":
                if found := self._loads.get(load) or self._leaving.get(load):
                    self._unmapped(handle, found)
            case "broke":
                if load in self._loads:
                    self._on_broken(load, _bad_version(message))
            case "counted":
                handle.counted = message["counted"]
                if (counting := handle.counting.get(message["ask"])) is not None:
                    counting.set_result(None)

    def _spawn(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _settle_with(asked: "asyncio.Future[float | None]", message: Message) -> None:
    if message["done"] == "prepared":
        asked.set_result(message["drift"])
    elif message["done"] == "rejected":
        asked.set_exception(_bad_version(message))
    else:
        asked.set_exception(Short(message["why"]))


def _bad_version(message: Message) -> BadVersion:
    return BadVersion(Reason(message["reason"]), message["detail"])


def _is_right(asked: "asyncio.Future[float | None]") -> bool:
    return asked.done() and not asked.cancelled() and asked.exception() is None


def _look_at(asked: "asyncio.Future[float | None]") -> None:
    """Take notice of an error, which nobody may wait for any more."""
    if not asked.cancelled():
        asked.exception()
