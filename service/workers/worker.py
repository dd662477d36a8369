"""A worker: answers requests with versions that its supervisor has verified, and flips when the others do."""

import asyncio
import gc
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import structlog
import torch

from emaswap import BadVersion, Manifest, Pin, Short, StoreError
from emaswap.errors import describe
from emaswap.files import tensor_file
from emaswap.versions import proof
from emaswap.versions.probe import Probe
from service.control.lane import Blocked, Hung, Lane
from service.control.shortage import is_shortage
from service.control.standing import Standing
from service.parts import Answering
from service.refusal import shorten
from service.serving.metrics import ServingMetrics
from service.serving.servable import Servable
from service.settings import ServiceSettings
from service.workers.arena import map_privately
from service.workers.channel import Channel, Message
from service.workers.flip import Flip, FlippedSlot

log = structlog.get_logger("emaswap.service")

_BEAT_EVERY_S = 0.2
_CPU = torch.device("cpu")


class Worker:
    """What one worker has, and what it does at its supervisor's word."""

    def __init__(self, settings: ServiceSettings, number: int, channel: Channel, flip: Flip) -> None:
        """Answer what comes to this process, as worker of this number."""
        self.settings = settings
        self.number = number
        self.draining = False
        self.flip = flip
        self.slot = FlippedSlot(flip)
        self.standing = Standing()
        self.answering = Answering(settings, self.slot, ServingMetrics(), self._give_up)
        self.serving = asyncio.Event()
        self.ends_with_all = False
        self.on_drain: Callable[[], None] = lambda: None
        self.connections: Callable[[], int] = lambda: 0
        self._channel = channel
        self._lane = Lane("emaswap-load")
        self._has_prepared = False
        self._wanted: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to do what the supervisor says. Called on the event loop."""
        self._channel.listen(self._receive, _end_at_once)
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def is_ahead(self) -> bool:
        """Return whether another worker has fewer connections."""
        own = self.connections()
        self.flip.hold(self.number, own)
        return own > self.flip.fewest()

    def drain(self) -> None:
        """Take no further part in sharing connections."""
        self.draining = True
        self.flip.leave(self.number)

    def close(self) -> None:
        """Let go of the threads."""
        self._lane.close()
        self.answering.batcher.close()

    def _beat(self) -> None:
        while True:
            self.flip.beat(self.number)
            if self.serving.is_set() and not self.draining:
                self.flip.hold(self.number, self.connections())
            time.sleep(_BEAT_EVERY_S)

    def _receive(self, message: Message, files: list[int]) -> None:
        match message["do"]:
            case "prepare":
                self._wanted.add(message["load"])
                task = asyncio.get_running_loop().create_task(self._prepare(message, files), name="prepare")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case "drop":
                self._wanted.discard(message["load"])
                self.slot.drop(message["load"])
            case "serve":
                self.serving.set()
            case "stand":
                pin = None if message["pin"] is None else Pin.model_validate(message["pin"])
                self.standing = Standing(status=message["status"], pin=pin)
            case "drain":
                self.ends_with_all = True
                if not self.draining:
                    self.on_drain()
            case "count":
                counted = {"done": "counted", "ask": message["ask"]}
                self._channel.send({**counted, "counted": self.answering.metrics.counted.state()})

    async def _prepare(self, message: Message, files: list[int]) -> None:
        """Build a version on a thread, and say how that went."""
        load = message["load"]
        try:
            servable = await self._lane.run(lambda: self._built(message, files), self.settings.load_timeout_s)
        except BadVersion as error:
            if is_shortage(error):
                said: Message = {"done": "short", "why": str(error)}
            else:
                said = {"done": "rejected", "reason": str(error.reason), "detail": shorten(error.detail)}
        except Blocked as error:  # then nobody has opened them
            for file in files:
                os.close(file)
            self._channel.send({"done": "unmapped", "load": load})
            said = {"done": "short", "why": str(error)}
        except (Hung, StoreError, MemoryError) as error:
            said = {"done": "short", "why": shorten(str(error) or "out of memory")}
        except Exception as error:
            log.exception("preparing failed", worker=self.number)
            said = {"done": "short", "why": shorten(describe(error))}
        else:
            if load not in self._wanted:  # it was given up meanwhile
                return
            self.slot.prepare(load, servable)
            if not self._has_prepared:
                # What is there by now stays: let the cycle collector, which stops everything else, never look at it again.
                gc.collect()
                gc.freeze()
                self._has_prepared = True
            said = {"done": "prepared", "drift": servable.drift}
        self._channel.send({**said, "load": load})

    def _built(self, message: Message, files: list[int]) -> Servable:
        with ExitStack() as closing:
            for file in files:
                closing.callback(os.close, file)
            weights_file, papers_file = files
            unmapped: Message = {"done": "unmapped", "load": message["load"]}
            try:
                papers = os.pread(papers_file, message["manifest_bytes"] + message["probe_bytes"], 0)
                arena = map_privately(weights_file, message["weights_bytes"])
            except OSError as error:
                self._channel.send_soon(unmapped)
                raise Short(f"the weights cannot be mapped: {error.strerror}") from error
        weakref.finalize(arena, self._channel.send_soon, unmapped).atexit = False
        return self._proven(arena, papers[: message["manifest_bytes"]], papers[message["manifest_bytes"] :])

    def _proven(self, arena: mmap.mmap, manifest_bytes: bytes, probe_bytes: bytes) -> Servable:
        manifest = Manifest.decode(manifest_bytes).of_variant(self.settings.variant)
        probe = Probe.from_tensors(tensor_file.parse(np.frombuffer(bytearray(probe_bytes), np.uint8)).tensors)
        weights = tensor_file.parse(np.frombuffer(arena, np.uint8)).tensors
        module = proof.assemble(manifest, weights, trusted=self.settings.trusted, device=_CPU, adopt=True)
        return Servable.proven(manifest, module, probe, _CPU, before=self.slot.current)

    def _give_up(self, servable: Servable, error: BadVersion) -> None:
        load = self.slot.load_of(servable)
        if load is not None:
            detail = shorten(error.detail)
            self._channel.send({"done": "broke", "load": load, "reason": str(error.reason), "detail": detail})


def _end_at_once() -> None:
    log.error("the supervisor has gone; ending at once")
    os._exit(1)
