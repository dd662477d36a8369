"""How things stand: one frozen answer for routes, operators, metrics and health checks."""

from dataclasses import dataclass

from emaswap import Pin
from service.control.lifecycle import Record
from service.serving.servable import Served


@dataclass(frozen=True)
class Standing:
    """What is live, what was ordered, and what was concluded at the last look at the store.

    Attributes:
        live: the version that answers.
        pin: the operators' order.
        status: the last conclusion, in words.
        newest: the newest version in the store, 0 before the first.
        in_store: whether the store has the live version as itself; `None` when nothing is live.
        records: the newest versions and their states, newest first.
    """

    live: Served | None = None
    pin: Pin | None = None
    status: str = "the store has not been looked at yet"
    newest: int = 0
    in_store: bool | None = None
    records: tuple[Record, ...] = ()

    def record(self, version: int) -> Record | None:
        """Return the record of the version that has this number now."""
        return next((record for record in self.records if record.version == version), None)
