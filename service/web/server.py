"""The HTTP server: uvicorn with our connections, which drains before it stops and ends in time."""

import math
import os
import signal
import socket
import threading
import time
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from service.parts import Service
from service.web.fast_path import protocol

log = structlog.get_logger("emaswap.service")


STOPPING_S = 1.0
"""How long the parts may take to stop once no request is left."""


class Server(uvicorn.Server):
    """A uvicorn server that says "not ready" for a while before it stops taking connections, and ends with 0."""

    def __init__(self, app: FastAPI) -> None:
        """Serve an application as `create_app` makes it, as its settings say."""
        service: Service = app.state.service
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                app,
                # What uvicorn calls for each connection may be any callable; its annotation names the classes alone.
                http=protocol(app.state.predict),  # type: ignore[arg-type]
                ws="none",
                host=settings.host,
                port=settings.port,
                uds=str(settings.uds) if settings.uds else None,
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
        self._service = service
        self._exit_at = float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            settings = self._service.settings
            if settings.uds:
                log.info("listening", uds=str(settings.uds), store=settings.store)
            else:
                host, port = self.servers[0].sockets[0].getsockname()[:2]
                log.info("listening", host=host, port=port, store=settings.store)

    def handle_exit(self, sig: int, _: FrameType | None) -> None:
        """Start the drain at the first signal, and end the process at once at the second."""
        name = signal.Signals(sig).name
        if self._service.draining:
            try:
                log.warning("ending at once", signal=name)
            finally:
                os._exit(128 + sig)
        settings = self._service.settings
        self._service.draining = True
        self._exit_at = time.monotonic() + settings.drain_s
        log.info("draining", signal=name, seconds=settings.drain_s)
        last_resort = threading.Timer(settings.drain_s + settings.shutdown_s + STOPPING_S, end_anyway)
        last_resort.daemon = True
        last_resort.start()

    async def on_tick(self, counter: int) -> bool:
        """Tell uvicorn, which asks ten times a second, whether to end."""
        return await super().on_tick(counter) or time.monotonic() >= self._exit_at


def end_anyway() -> None:
    """End the process although something in it hangs."""
    log.error("something hangs; ending all the same")
    os._exit(0)
