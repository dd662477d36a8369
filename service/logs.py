"""Structured logs: one line for each event, as JSON for machines or as text for a person at a terminal."""

import logging
import sys
import time
from collections.abc import Callable
from typing import Literal

import structlog


def configure(form: Literal["auto", "json", "text"]) -> None:
    """Send structlog's and the standard library's log lines to standard output in one form."""
    text = form == "text" or (form == "auto" and sys.stdout.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer = (
        structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty()) if text else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.getLogger("watchfiles").setLevel(logging.WARNING)


class Seldom:
    """Lets one line through in each period, for events that clients can cause as often as they like."""

    def __init__(self, period_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._period_s = period_s
        self._clock = clock
        self._next_at = float("-inf")
        self._skipped = 0

    def skipped(self) -> int | None:
        """Return `None` when the line is to be left out, else how many were left out since the last one."""
        now = self._clock()
        if now < self._next_at:
            self._skipped += 1
            return None
        self._next_at = now + self._period_s
        skipped, self._skipped = self._skipped, 0
        return skipped
