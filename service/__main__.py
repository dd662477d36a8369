"""`python -m service`: serve until told to stop."""

import shutil
import socket
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from starlette.types import Receive, Scope, Send

from emaswap import EmaswapError
from emaswap.device import pick_device, processors
from service import logs
from service.refusal import Code, Refusal
from service.settings import ServiceSettings
from service.web.app import create_app, create_control_app, create_worker_app
from service.web.server import STOPPING_S, Server, SupervisorServer, WorkerServer, end_anyway, listen
from service.workers.channel import Channel
from service.workers.flip import Flip
from service.workers.fork_server import ForkServer
from service.workers.supervisor import Supervisor
from service.workers.worker import Worker

# How long the event loop may keep the interpreter's lock from a forward pass, which needs it between two operations.
_SWITCH_INTERVAL_S = 5e-5


def main(arguments: list[str] | None = None) -> int:
    """Run the service with command-line arguments and return the exit status."""
    settings = ServiceSettings.read(arguments)
    logs.configure(settings.log_format)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        workers = _workers(settings)
        if workers > 1:
            _supervise(settings, workers)
        else:
            Server(create_app(settings)).run()
    except EmaswapError as error:
        print(f"service: {error}", file=sys.stderr)
        return 1
    _end_if_something_hangs()
    return 0


def _workers(settings: ServiceSettings) -> int:
    """Return how many workers there are to be. Raises `EmaswapError` when a device cannot be shared by so many."""
    on_cpu = pick_device(settings.device).type == "cpu"
    if settings.workers == "auto":
        return processors() if on_cpu else 1
    if settings.workers > 1 and not on_cpu:
        raise EmaswapError(
            f"--workers {settings.workers}: each would need its own copy of the weights on the GPU, and they would wait for "
            "each other there; use --workers 1, or --device cpu"
        )
    return settings.workers


class _Shared(NamedTuple):
    """What workers have from the process that they were forked from."""

    settings: ServiceSettings
    flip: Flip
    listener: socket.socket
    supervisor: Path


def _supervise(settings: ServiceSettings, workers: int) -> None:
    flip = Flip(workers)
    folder = Path(tempfile.mkdtemp(prefix="emaswap-"))
    path = folder / "supervisor"
    try:
        with listen(settings) as listener:
            fork_server = ForkServer(partial(_work, _Shared(settings, flip, listener, path)))
            try:
                app = create_control_app(Supervisor(settings, flip, fork_server), _no_answer)
                SupervisorServer(app, uds=path, listener=listener).run()
            finally:
                fork_server.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if settings.uds is not None:
            settings.uds.unlink(missing_ok=True)


def _work(shared: _Shared, number: int, end: socket.socket) -> None:
    """Be a worker."""
    worker = Worker(shared.settings, number, Channel(end), shared.flip)
    WorkerServer(create_worker_app(worker, shared.supervisor), shared.listener).run()
    _end_if_something_hangs()


async def _no_answer(_: Scope, __: Receive, ___: Send) -> None:
    raise Refusal(Code.NOT_FOUND, "a supervisor answers no requests for predictions; its workers do")


def _end_if_something_hangs() -> None:
    """End the process here if a thread is still at work: an interpreter that ends under it may abort."""
    until = time.monotonic() + STOPPING_S
    for thread in threading.enumerate():
        if thread.name.startswith("emaswap-"):
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                end_anyway()


if __name__ == "__main__":
    sys.exit(main())
