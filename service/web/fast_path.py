"""The hot route inside uvicorn's protocol: no ASGI scope, no cycle, no task for a request.

A connection answers `POST /predict` itself. Every other request, and one that comes in an unusual way (an upgrade,
`Expect`, chunks, pipelined behind another), goes to the ASGI application, as it always does.

Clients repeat themselves: the heads of their requests are the same bytes again and again. A head that has been parsed
once is known from then on, and a request that comes whole behind a known head costs a look into a dictionary. What is
not known goes through uvicorn's parser, so there is only one opinion of what HTTP is.
"""

import asyncio
import time
from typing import Any, Protocol, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.refusal import Code, Refusal
from service.web import refused
from service.web.head import Head, is_hot, read_head
from service.web.json_rows import LARGE_BYTES
from service.web.limits import Limits
from service.web.predict import Exchange, Predict

_END_OF_HEAD = b"\r\n\r\n"
_CLOSE = b"connection: close\r\n"
_MAX_KNOWN_HEADS = 1000
_MAX_KNOWN_HEAD_BYTES = 4096
_OFFER = frozenset({b"upgrade", b"connection", b"http2-settings"})
_UNUSUAL = frozenset({b"expect", b"upgrade", b"transfer-encoding"})
# Requests that a client has to send before they run together with those of others again.
_PROBATION = 64
_MAX_HEAD_BYTES = 64 << 10
# How long, and for how many bytes, a client may go on with a body that was refused, so that it can read why.
_LINGER_S = 5.0
# How long a connection without a request is kept at the end.
_FIRST_REQUEST_S = 0.5
_LINGER_BYTES = 256 << 20


class Hot:
    """What all connections of one service share."""

    def __init__(self, predict: Predict) -> None:
        self.predict = predict
        self.known: dict[bytes, Head] = {}
        self.body_bytes = 0
        self.max_body_bytes = predict.settings.max_waiting_bytes
        settings = predict.settings
        # Answers to other origins get their headers from the application.
        self.unusual = _UNUSUAL | {b"origin"} if settings.cors_origin else _UNUSUAL
        self.limits = Limits(
            most=settings.max_connections,
            idle_s=settings.idle_timeout_s,
            head_s=settings.head_timeout_s,
            body_s=settings.body_timeout_s,
        )
        self._pairs: list[tuple[bytes, bytes]] = []
        self._defaults = b""

    def learn(self, data: bytes, head: Head) -> None:
        """Know the head that these bytes are from now on."""
        if len(self.known) >= _MAX_KNOWN_HEADS:
            self.known.clear()
        self.known[data] = head

    def defaults(self, pairs: list[tuple[bytes, bytes]]) -> bytes:
        """Return the headers that the server adds to every answer, as lines. It makes a new list when they change."""
        if pairs is not self._pairs:
            self._pairs = pairs
            self._defaults = b"".join(b"%b: %b\r\n" % pair for pair in pairs)
        return self._defaults


class MakesProtocol(Protocol):
    """What uvicorn calls for each connection."""

    def __call__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: Any = None
    ) -> asyncio.Protocol: ...


def protocol(predict: Predict) -> MakesProtocol:
    """Return what makes the connections of a service: give it to uvicorn as `Config(http=...)`."""
    hot = Hot(predict)

    def connect(
        config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: Any = None
    ) -> asyncio.Protocol:
        return Connection(config, server_state, app_state, _loop, hot=hot)

    return connect


class Connection(HttpToolsProtocol):
    """One connection of a client's."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: Any = None, *, hot: Hot
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._hot = hot
        self._known = hot.known
        self._current: _Current | None = None
        self._started: RequestResponseCycle | None = None
        self._between_messages = True
        # Whether the next byte begins a request, and nothing is under way before it.
        self._at_rest = True
        # Whether a request has come at all.
        self._asked = False
        self._data = b""
        self._head_bytes = 0
        self._in_head = False
        self._declining = False
        self._lingering = 0
        self.probation = 0
        self.due: float | None = None

    # -- what the transport calls -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for the first request, where there is room for another connection."""
        super().connection_made(cast("asyncio.Transport", transport))
        self.due = self.loop.time() + self._hot.limits.idle_s
        if self._hot.predict.draining():
            self.loop.call_later(_FIRST_REQUEST_S, self._end)
        if not self._hot.limits.opened(self):
            self._refuse(Refusal(Code.QUEUE_IS_FULL, f"{self._hot.limits.most} connections are open already"))

    def data_received(self, data: bytes) -> None:
        """Take bytes from the client."""
        if self._at_rest:
            end = data.find(_END_OF_HEAD) + 4
            head = self._known.get(data[:end])
            if head is not None and head.length == len(data) - end and not self.flow.write_paused:
                self._at_rest = False
                self._asked = True
                self.due = None
                self._unset_keepalive_if_required()
                current = _Current(self, head, time.perf_counter(), data[end:])
                self._current = self.cycle = current  # type: ignore[assignment]
                self._hot.predict.arrive(current)
                return
            self._data = data
        elif self._lingering:
            self._lingering += len(data)
            if self._lingering > _LINGER_BYTES:
                self.transport.close()
            return
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(Refusal(Code.INVALID_HTTP, "what came is not a request of HTTP/1.1"))
        except httptools.HttpParserUpgrade as upgrade:
            self._decline(data[upgrade.args[0] :])
        self._data = b""
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse(Refusal(Code.HEAD_TOO_LARGE, f"expected at most {_MAX_HEAD_BYTES} bytes of headers"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of the request whose client has gone."""
        self._hot.limits.closed(self)
        self.due = None
        if (current := self._current) is not None:
            current.release()
            self._hot.predict.batcher.drop(current)
            self._current = None
        if self._started is not None:  # uvicorn tells the last of pipelined requests alone
            self._started.disconnected = True
            self._started.message_event.set()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._started = cycle
        cycle.disconnected = cycle.disconnected or self.transport.is_closing()
        super()._start_asgi_task(cycle, app)

    # -- what the parser calls ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._between_messages = self._at_rest = False
        self._in_head, self._head_bytes = True, 0
        self.due = self.loop.time() + self._hot.limits.head_s

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header. What comes behind a body in chunks is nobody's."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Keep a request for the hot route, and leave any other to the application."""
        self._in_head = False
        self._asked = True
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._declining = True
            return
        self.due = self.loop.time() + self._hot.limits.body_s
        if not self._is_hot():
            super().on_headers_complete()
            if self._hot.predict.draining():
                self.cycle.keep_alive = False
            return
        head = read_head(self.url, self.headers, self._hot.predict.rules)
        self._current = current = _Current(self, head, time.perf_counter())
        self.cycle = cast("RequestResponseCycle", current)
        current.keep_alive = self.parser.should_keep_alive() and self.parser.get_http_version() == "1.1"
        if head.length is None:  # which only a refusal has here
            if cast("Refusal", head.refusal).code is Code.BODY_TOO_LARGE:
                self._hot.predict.refuse(current, cast("Refusal", head.refusal))
            return
        end = self._data.find(_END_OF_HEAD) + 4
        if 4 < end <= _MAX_KNOWN_HEAD_BYTES and current.keep_alive:
            self._hot.learn(self._data[:end], head)

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        if self._is_mine:
            current = cast("_Current", self._current)
            if not current.take(body):
                hot = self._hot
                detail = f"bodies of {hot.body_bytes} bytes are here already, and at most {hot.max_body_bytes} may be"
                hot.predict.refuse(current, Refusal(Code.QUEUE_IS_FULL, detail))
        elif not self._lingering:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        if self._declining:
            return
        self._between_messages = True
        self.due = None
        if self._is_mine:
            current = cast("_Current", self._current)
            current.complete()
            self._hot.predict.arrive(current)
        elif not self._lingering:
            super().on_message_complete()
            self._rest()

    # -- what ends a request ------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """Note that the application has answered a request."""
        super().on_response_complete()
        self._rest()

    def write(self, status: int, lines: bytes, body: bytes) -> None:
        """Write the answer to the current request, and be ready for the next."""
        current, hot, transport = self._current, self._hot, self.transport
        if current is None or transport.is_closing():
            return
        close = not (current.is_complete and current.keep_alive) or hot.predict.draining()
        transport.write(
            b"%b%b%b%bcontent-length: %d\r\n\r\n%b"
            % (
                STATUS_LINE[status],
                hot.defaults(self.server_state.default_headers),
                lines,
                _CLOSE if close else b"",
                len(body),
                body,
            )
        )
        current.release()
        self._current = None
        if cast("object", self.cycle) is current:  # else it is the newest of those behind, whose body may still come
            self.cycle = None  # type: ignore[assignment]
        self.server_state.total_requests += 1
        if not close:
            self.flow.resume_reading()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
            self._rest()
        else:
            self._linger()

    @property
    def is_idle(self) -> bool:
        """Whether nothing would be lost if it were closed."""
        return self._at_rest

    def expire(self) -> None:
        """Give up a client that keeps this connection waiting."""
        self.due = None
        if self._current is not None:
            seconds = self._hot.limits.body_s
            refusal = Refusal(Code.BODY_TIMEOUT, f"the body did not end within {seconds:g} s")
            self._hot.predict.refuse(self._current, refusal)
        elif self._in_head and not self._lingering:
            self._refuse(Refusal(Code.HEAD_TIMEOUT, f"the headers did not end within {self._hot.limits.head_s:g} s"))
        else:
            self.transport.close()

    def _decline(self, rest: bytes) -> None:
        """Take a request without the upgrade that it offers: HTTP allows to ignore that, and the body is not lost.

        The parser has stopped before the body, so a new one gets the head again, without the offer.
        """
        head = [b"%b %b HTTP/1.1" % (self.parser.get_method(), self.url)]
        head += [b"%b: %b" % (name, value) for name, value in self.headers if name not in _OFFER]
        self._declining = False
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join(head) + _END_OF_HEAD + rest)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what is no request yet, and close the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False  # what came before is answered first, and then there is no answer to this
            return
        body, status = refused.body(refusal), refused.STATUS[refusal.code]
        lines = refused.lines(refusal) + self._hot.defaults(self.server_state.default_headers) + _CLOSE
        self.transport.write(b"%b%bcontent-length: %d\r\n\r\n%b" % (STATUS_LINE[status], lines, len(body), body))
        self._linger()

    def shutdown(self) -> None:
        """Close the connection, once its request is answered if there is one."""
        if self._asked:
            self._end()
        else:  # who has just connected has a request on its way
            self.loop.call_later(_FIRST_REQUEST_S, self._end)

    def _end(self) -> None:
        if self._current is not None:
            self._current.keep_alive = False
        else:
            super().shutdown()

    def _rest(self) -> None:
        """Wait for the next request, if nothing is under way."""
        self._at_rest = (
            self._between_messages
            and self._current is None
            and not self.pipeline
            and (self.cycle is None or self.cycle.response_complete)
        )
        if self._at_rest:
            self.due = self.loop.time() + self._hot.limits.idle_s

    def _is_hot(self) -> bool:
        names = [name for name, _ in self.headers]
        return (
            is_hot(self.url)
            and (self.cycle is None or self.cycle.response_complete)
            and self.parser.get_method() == b"POST"
            and not self.flow.write_paused
            and b"content-length" in names
            and self._hot.unusual.isdisjoint(names)
        )

    @property
    def _is_mine(self) -> bool:
        """Whether the request that is being parsed is answered here, and not by the application."""
        return self._current is not None and cast("object", self.cycle) is self._current

    def _linger(self) -> None:
        """Say that nothing more is sent, and read on for a while: what is closed on unread bytes loses the answer."""
        self._at_rest = False
        self._lingering = 1
        self.due = self.loop.time() + _LINGER_S
        self.transport.write_eof()


class _NoEvent:
    """In the place of the event by which uvicorn wakes the application of a request."""

    def set(self) -> None:
        """Wake nobody."""


class _Current(Exchange):
    """The request that a connection is answering. To uvicorn's protocol it is a cycle that is not complete."""

    __slots__ = ("_connection", "_held", "_parts", "disconnected", "is_complete", "keep_alive")

    response_complete = False
    message_event = _NoEvent()

    def __init__(self, connection: Connection, head: Head, began: float, body: bytes | None = None) -> None:
        super().__init__(connection._hot.predict, head, b"" if body is None else body, began)
        self._connection = connection
        self._held = 0
        self._parts: list[bytes] = []
        self.is_complete = body is not None
        self.keep_alive = True
        if connection.probation:
            connection.probation -= 1
            self.alone = self.suspect = True

    def take(self, part: bytes) -> bool:
        """Take a part of the body, and return whether there was room; it is not kept where the head is refused."""
        if self.head.refusal is None and not self.gone:
            hot = self._connection._hot
            if self._held + len(part) > LARGE_BYTES and hot.body_bytes + len(part) > hot.max_body_bytes:
                return False
            self._parts.append(part)
            self._held += len(part)
            hot.body_bytes += len(part)
        return True

    def release(self) -> None:
        """Give back the room that the body took."""
        self._connection._hot.body_bytes -= self._held
        self._held = 0

    def complete(self) -> None:
        """Note that the body is whole."""
        self.is_complete = True
        if self.head.refusal is None:
            self.body = b"".join(self._parts)
            self._parts.clear()

    def reply(self, status: int, lines: bytes, body: bytes) -> None:
        """Write the answer to the connection."""
        self._connection.write(status, lines, body)

    def blame(self) -> None:
        """Run the next requests of this client by themselves, so that its neighbours need not run again."""
        self._connection.probation = _PROBATION

    def fail(self, _: Exception, /) -> None:
        """Write that the fault is ours."""
        refusal = Refusal(Code.INTERNAL_ERROR, "a fault of the service's own, which its log tells about")
        self._connection.write(500, refused.PLAIN, refused.body(refusal))
