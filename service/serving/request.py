"""A request as the model sees it: rows that wait for their turn, and who is to be told of the outcome."""

from collections.abc import Sequence
from typing import Protocol

from emaswap import Signature
from service.refusal import Refusal
from service.serving.servable import Rows, Servable


class Asker(Protocol):
    """Who asked, and is told how it ended: on the event loop, once for each request, and never for one that was dropped."""

    def answered(self, requests: Sequence["Request"], outputs: Rows, servable: Servable) -> None:
        """Take the outputs for requests of one batch: stacked, in the order of the requests."""

    def refused(self, request: "Request", refusal: Refusal) -> None:
        """Take the refusal of a request."""

    def superseded(self, request: "Request", *, broken: bool) -> None:
        """Take back a request that was validated for a version which is not live any more, or turned out `broken`."""

    def failed(self, request: "Request", error: Exception) -> None:
        """Take an error that is a fault of ours."""


class Request:
    """One request: `rows` rows of inputs, by name, that fit a signature.

    `alone` is set for one that must share its batch with no other, `suspect` for one whose client has just sent what the
    model cannot take. `began`, when it came, and `deadline` are on the clock of `time.perf_counter`, in seconds; a
    request whose turn has not come by its deadline is refused.
    """

    __slots__ = ("alone", "asker", "began", "deadline", "gone", "inputs", "rows", "signature", "size_bytes", "suspect")

    def __init__(self, asker: Asker, began: float, deadline: float | None = None) -> None:
        self.asker = asker
        self.began = began
        self.deadline = deadline
        self.alone = False
        self.suspect = False
        self.gone = False

    def validated(self, inputs: Rows, rows: int, signature: Signature) -> None:
        """Note the inputs, which fit this signature."""
        self.inputs = inputs
        self.rows = rows
        self.signature = signature
        self.size_bytes = sum(array.nbytes for array in inputs.values())

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of a row: only rows of one size can be stacked."""
        return [array.shape[1:] for array in self.inputs.values()]
