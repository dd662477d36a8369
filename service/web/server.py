"""The HTTP server: uvicorn with our connections, which drains before it stops and ends in time."""

import asyncio
import contextlib
import math
import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import structlog
import uvicorn
from starlette.applications import Starlette

from service.settings import ServiceSettings
from service.web.accept import Acceptor
from service.web.fast_path import MakesProtocol, protocol
from service.web.predict import Predict
from service.workers.supervisor import Supervisor
from service.workers.worker import Worker

log = structlog.get_logger("emaswap.service")


STOPPING_S = 1.0
"""How long the parts may take to stop once no request is left."""


# How long workers have to take what has come to their socket before it is closed.
_LAST_CONNECTIONS_S = 0.1


class Parts(Protocol):
    """What a server starts and stops: its settings, and whether it is draining."""

    settings: ServiceSettings
    draining: bool


class Server(uvicorn.Server):
    """A uvicorn server that says "not ready" for a while before it stops taking connections, and ends with 0."""

    def __init__(self, app: Starlette, *, uds: Path | None = None) -> None:
        """Serve an application as `create_app` makes it, where its settings say, or at another Unix socket."""
        self._parts: Parts = app.state.service
        settings = self._parts.settings
        predict: Predict | None = getattr(app.state, "predict", None)
        uds = uds or settings.uds
        super().__init__(
            uvicorn.Config(
                app,
                # What uvicorn calls for each connection may be any callable; its annotation names the classes alone.
                http="auto" if predict is None else protocol(predict),  # type: ignore[arg-type]
                ws="none",
                host=settings.host,
                port=settings.port,
                uds=str(uds) if uds else None,
                root_path=settings.root_path.rstrip("/"),
                proxy_headers=bool(settings.trusted_proxies),
                forwarded_allow_ips=list(settings.trusted_proxies),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=math.ceil(settings.idle_timeout_s),
                timeout_graceful_shutdown=round(settings.shutdown_s) or 1,
            )
        )
        self._exit_at = float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets is None:
            log_listening(self._parts.settings, self.servers[0].sockets[0].getsockname())

    def handle_exit(self, sig: int, _: FrameType | None) -> None:
        """Start the drain at the first signal, and end the process at once at the second."""
        name = signal.Signals(sig).name
        if self._parts.draining:
            try:
                log.warning("ending at once", signal=name)
            finally:
                os._exit(128 + sig)
        self._drain(name)

    async def on_tick(self, counter: int) -> bool:
        """Tell uvicorn, which asks ten times a second, whether to end."""
        return await super().on_tick(counter) or time.monotonic() >= self._exit_at

    def _drain(self, name: str) -> None:
        settings = self._parts.settings
        self._parts.draining = True
        self._exit_at = time.monotonic() + settings.drain_s
        log.info("draining", signal=name, seconds=settings.drain_s)
        last_resort = threading.Timer(settings.drain_s + settings.shutdown_s + STOPPING_S, end_anyway)
        last_resort.daemon = True
        last_resort.start()


class WorkerServer(Server):
    """The server of a worker: it takes its part of the connections to a socket that all workers share."""

    def __init__(self, app: Starlette, listener: socket.socket) -> None:
        """Serve an application as `create_worker_app` makes it."""
        super().__init__(app)
        self._worker: Worker = app.state.service
        self._worker.on_drain = lambda: self._drain("SIGTERM")
        self._listener = listener
        self._acceptor: Acceptor | None = None
        self._accepting: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        del sockets
        await super().startup(sockets=[])
        if self.started:
            self._worker.connections = lambda: len(self.server_state.connections)
            self._accepting = asyncio.create_task(self._accept(), name="accept")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
        if self._acceptor is not None:
            await self._acceptor.close(for_all=self._worker.ends_with_all)
        await super().shutdown(sockets)

    def _drain(self, name: str) -> None:
        super()._drain(name)
        self._worker.drain()

    async def _accept(self) -> None:
        await self._worker.serving.wait()
        self._acceptor = Acceptor(self._listener, self._connect, self._worker.is_ahead)

    def _connect(self) -> asyncio.Protocol:
        make: MakesProtocol = self.config.http_protocol_class  # type: ignore[assignment]
        return make(self.config, self.server_state, self.lifespan.state)


class SupervisorServer(Server):
    """The server of a supervisor, which its workers ask. It ends when they have."""

    def __init__(self, app: Starlette, *, uds: Path, listener: socket.socket) -> None:
        """Listen at a Unix socket, for workers that share this listener."""
        super().__init__(app, uds=uds)
        self._supervisor: Supervisor = app.state.service
        self._listener = listener

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await uvicorn.Server.startup(self, sockets)
        if self.started:
            log_listening(self._parts.settings, self._listener.getsockname())

    async def on_tick(self, counter: int) -> bool:
        if self._parts.draining and not self._supervisor.pool.handles:
            return True
        return await super().on_tick(counter)

    def _drain(self, name: str) -> None:
        super()._drain(name)
        settings = self._parts.settings
        # Once the workers take no connections any more, nobody is to wait for one in vain.
        asyncio.get_running_loop().call_later(settings.drain_s + _LAST_CONNECTIONS_S, self._refuse_connections)
        # Until the workers have ended in their own time.
        self._exit_at += settings.shutdown_s + STOPPING_S
        self._supervisor.pool.end()

    def _refuse_connections(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)


def listen(settings: ServiceSettings) -> socket.socket:
    """Return a listening socket as the settings say, which processes can share. Ends the process where there is none."""
    if settings.uds is not None and settings.uds.is_socket():
        settings.uds.unlink()  # what a service that was killed left behind
    uds = str(settings.uds) if settings.uds else None
    config = uvicorn.Config("", host=settings.host, port=settings.port, uds=uds, log_config=None)
    listener = config.bind_socket()
    listener.setblocking(False)
    listener.listen(config.backlog)
    return listener


def log_listening(settings: ServiceSettings, name: Any) -> None:
    """Say where a service listens."""
    if settings.uds:
        log.info("listening", uds=str(settings.uds), store=settings.store)
    else:
        log.info("listening", host=name[0], port=name[1], store=settings.store)


def end_anyway() -> None:
    """End the process although something in it hangs."""
    log.error("something hangs; ending all the same")
    os._exit(0)
