"""`python -m service`: serve until told to stop."""

import sys
import threading
import time

from emaswap import EmaswapError
from service import logs
from service.settings import ServiceSettings
from service.web.app import create_app
from service.web.server import STOPPING_S, Server, end_anyway

# How long the event loop may keep the interpreter's lock from a forward pass, which needs it between two operations.
_SWITCH_INTERVAL_S = 5e-5


def _end_if_something_hangs() -> None:
    """End the process here if a thread is still at work: an interpreter that ends under it may abort."""
    until = time.monotonic() + STOPPING_S
    for thread in threading.enumerate():
        if thread.name.startswith("emaswap-"):
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                end_anyway()


def main(arguments: list[str] | None = None) -> int:
    """Run the service with command-line arguments and return the exit status."""
    settings = ServiceSettings.read(arguments)
    logs.configure(settings.log_format)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        app = create_app(settings)
    except EmaswapError as error:
        print(f"service: {error}", file=sys.stderr)
        return 1
    Server(app).run()
    _end_if_something_hangs()
    return 0


if __name__ == "__main__":
    sys.exit(main())
