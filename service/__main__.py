"""`python -m service`: serve until told to stop."""

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

import structlog
import uvicorn

from emaswap import EmaswapError
from service import logs
from service.parts import Service
from service.settings import ServiceSettings
from service.web.app import create_app

log = structlog.get_logger("emaswap.service")


_STOPPING_S = 1.0
"""How long the parts may take to stop once no request is left."""


class Server(uvicorn.Server):
    """A uvicorn server that says "not ready" for a while before it stops taking connections, and ends with 0."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._exit_at = float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            log.info("listening", host=host, port=port, store=self._service.settings.store)

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
        last_resort = threading.Timer(settings.drain_s + settings.shutdown_s + _STOPPING_S, _end_anyway)
        last_resort.daemon = True
        last_resort.start()

    async def on_tick(self, counter: int) -> bool:
        """Tell uvicorn, which asks ten times a second, whether to end."""
        return await super().on_tick(counter) or time.monotonic() >= self._exit_at


def _end_anyway() -> None:
    log.error("something hangs; ending all the same")
    os._exit(0)


def _end_if_something_hangs() -> None:
    """End the process here if a thread is still at work: an interpreter that ends under it may abort."""
    until = time.monotonic() + _STOPPING_S
    for thread in threading.enumerate():
        if thread.name.startswith("emaswap-"):
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                _end_anyway()


def main(arguments: list[str] | None = None) -> int:
    """Run the service with command-line arguments and return the exit status."""
    settings = ServiceSettings.read(arguments)
    logs.configure(settings.log_format)
    try:
        app = create_app(settings)
    except EmaswapError as error:
        print(f"service: {error}", file=sys.stderr)
        return 1
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=round(settings.shutdown_s) or 1,
    )
    Server(config, app.state.service).run()
    _end_if_something_hangs()
    return 0


if __name__ == "__main__":
    sys.exit(main())
