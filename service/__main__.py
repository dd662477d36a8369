"""`python -m service`: serve until told to stop."""

import signal
import socket
import sys
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

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal starts the drain; a second one cuts it short."""
        if self._service.draining:
            super().handle_exit(sig, frame)
            return
        self._service.draining = True
        self._exit_at = time.monotonic() + self._service.settings.drain_s
        log.info("draining", signal=signal.Signals(sig).name, seconds=self._service.settings.drain_s)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to end."""
        return await super().on_tick(counter) or time.monotonic() >= self._exit_at


def main(arguments: list[str] | None = None) -> int:
    """Run the service with command-line arguments; the exit status."""
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
