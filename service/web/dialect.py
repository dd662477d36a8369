"""Dialects: the ways in which a request can write its rows, and its answer be written."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from service.refusal import Refusal
from service.serving.servable import Rows, Servable
from service.web import refused


class Parsed(NamedTuple):
    """What a body holds: inputs that fit the signature, and what the request asks of its answer besides."""

    inputs: Rows
    asked: object = None


class Dialect(ABC):
    """One way to write requests and answers."""

    @abstractmethod
    def parse(self, body: bytes, servable: Servable, max_rows: int) -> Parsed:
        """Return the inputs that a body holds. Raises `Refusal`, which says what was expected and what came."""

    @abstractmethod
    def encode(self, outputs: Rows, servable: Servable, asked: object) -> tuple[bytes, bytes]:
        """Return an answer: its headers besides the length, as lines of HTTP, and its body. Raises `Refusal`."""

    def refuse(self, refusal: Refusal) -> bytes:
        """Return the body of a refusal, which is JSON."""
        return refused.body(refusal)
