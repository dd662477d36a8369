"""Requests that are right, nearly right, or not, and the answers to them over raw sockets."""

import contextlib
import io
import json
import random
import re
import socket
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from tests.serving import Served

GOOD = b'{"inputs": [[1, 2, 3]]}'
_V2 = b'{"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}'


def connect(served: Served) -> socket.socket:
    """A connection to a service, as bare as can be."""
    url = urlsplit(served.url)
    assert url.hostname
    assert url.port
    return socket.create_connection((url.hostname, url.port), timeout=10)


def _npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones((2, 3), np.float32))
    return file.getvalue()


def exchange(served: Served, parts: list[bytes], requests: int, *, patience_s: float = 0.15) -> list[tuple[int, Any]]:
    """The answers to so many requests, sent part by part on one connection: each one's status and body.

    There may be fewer answers, and then none for a while, or the connection ends.
    """
    data = b""
    with contextlib.suppress(ConnectionError), connect(served) as connection:
        connection.settimeout(patience_s)
        with contextlib.suppress(TimeoutError):
            for part in parts:
                connection.sendall(part)
            while len(answers(data)) < requests and (more := connection.recv(1 << 16)):
                data += more
    return answers(data)


def answers(data: bytes) -> list[tuple[int, Any]]:
    """The whole answers in some bytes."""
    found: list[tuple[int, Any]] = []
    while b"\r\n\r\n" in data:
        head, _, data = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        body, data = (data[: int(length[1])], data[int(length[1]) :]) if length else (b"", data)
        if length and len(body) < int(length[1]):
            break
        if not head.startswith(b"HTTP/1.1 100"):
            is_json = b"content-type: application/json" in head
            found.append((int(head.split()[1]), json.loads(body) if is_json and body else None))
    return found


_NPY = _npy()


class Odd:
    """Makes requests that are right, nearly right, or not."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def requests(self) -> tuple[list[bytes], int]:
        """Some requests, in the parts in which they are sent, and how many they are."""
        choose = self._random.choice
        count = choose([1, 1, 1, 2, 3])
        data = b"".join(self._one() for _ in range(count))
        if self._random.random() < 0.1:
            mutated = bytearray(data)
            for _ in range(choose([1, 2, 5])):
                mutated[self._random.randrange(len(data))] = self._random.randrange(256)
            data = bytes(mutated)
        cuts = sorted(self._random.randrange(len(data)) for _ in range(choose([0, 0, 1, 2])))
        return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)], count

    def _one(self) -> bytes:
        choose, chance = self._random.choice, self._random.random
        body = self._body()
        line = choose([b"POST /predict HTTP/1.1"] * 20 + [b"GET /healthz HTTP/1.1", b"POST /predict?a=b HTTP/1.1",
            b"POST /predict HTTP/1.0", b"post /predict HTTP/1.1", b"POST http://test/predict HTTP/1.1", b"POST  /predict HTTP/1.1",
            b"POST /v2/models/test/infer HTTP/1.1", b"POST /v2/models/test/versions/1/infer HTTP/1.1",
            b"POST /v2/models/no/infer HTTP/1.1", b"PUT /predict HTTP/1.1", b"POST /predict/ HTTP/1.1", b"POST /predic%74 HTTP/1.1", b"OPTIONS * HTTP/1.1"])  # fmt: skip
        headers = [b"Host: test"]
        chunked = chance() < 0.1
        if chunked:
            headers.append(b"Transfer-Encoding: chunked")
            half = len(body) // 2
            parts = [part for part in (body[:half], body[half:]) if part]
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        if not chunked or chance() < 0.1:
            length = len(body) + (choose([-1, 1, 5]) if chance() < 0.03 else 0)
            headers.append(b"Content-Length: %d" % max(length, 0))
        if chance() < 0.5:
            headers.append(b"Content-Type: application/json")
        for _ in range(choose([0, 0, 0, 1, 2])):
            headers.append(choose([b"X-Min-Model-Version: 1", b"X-Min-Model-Version: 9", b"X-Min-Model-Version: x",
                b"X-Request-Timeout-Ms: 60000", b"X-Request-Timeout-Ms: 0", b"X-Request-Timeout-Ms: -1",
                b"Content-Type: text/plain", b"Content-Type: application/octet-stream", b"Content-Type: application/x-numpy",
                b"Accept: application/x-numpy", b"Accept: text/html", b"Inference-Header-Content-Length: 5", b"Content-Encoding: gzip", b"Connection: close", b"Connection: keep-alive",
                b"Expect: 100-continue", b"Accept: */*", b"Content-Length: 20001", b"Content-Length: " + b"0" * 5000,
                b"Content-Length: -1", b"X: \xff\x00", b"X:" + b"y" * 3000, b"Cookie: a=b", b"Host: other"]))  # fmt: skip
        self._random.shuffle(headers)
        return b"\r\n".join([line, *headers, b"", b""]) + body

    def _body(self) -> bytes:
        choose = self._random.choice
        return choose([GOOD] * 8 + [_V2, _V2, _V2[:-1], _NPY, _NPY[:-4], np.ones(6, "<f4").tobytes(), b'{"inputs": [[1, 2, 3], [4, 5, 6.5]]}', b"", b"{}", b"[1]", b'{"inputs": [[1, 2]]}',
            b'{"inputs": [[1, 2, null]]}', b'{"inputs": [[1, 2, true]]}', b'{"inputs": [[1, 2, "3"]]}', b'{"inputs": []}',
            b'{"inputs": [[1, 2, 1e39]]}', b'{"inputs": [[1, 2, 16777217]]}', b'{"inputs": {"input": [[1, 2, 3]]}}',
            b'{"inputs": [[1, 2, 3]], "inputs": [[3, 2, 1]]}', b'{"inputs": [[1, 2, 3]], "more": 1}', b'{"inputs": [[1, 2, 3]]',
            b'{"inputs": [[1],[1, 2, 3]]}', b'{"inputs": ' + b"[[1, 2, 3]," * 10, b'{"inputs": [' + b"[1,2,3]," * 8 + b"[1,2,3]]}",
            b'{"inputs": [[' + b"1," * 9000 + b"1]]}", b"\xff\xfe", b'{"inputs": [[1, 2, ' + b"9" * 400 + b"]]}"])  # fmt: skip
