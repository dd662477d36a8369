"""The two doors of a service: its own connections, and the ASGI application behind any other server's."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest

from emaswap import DirectoryStore
from tests.models import Linear
from tests.odd import Odd, answers, connect, exchange
from tests.service.web.test_predict import ROWS, put, serving
from tests.serving import Served, other_door
from tests.soak import times


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Served]]:
    """One service behind both of its doors."""
    store = DirectoryStore(tmp_path_factory.mktemp("doors"))
    put(store, Linear(), ROWS)
    with serving(store, max_body_bytes=20_000, max_batch_rows=8) as served, other_door(served) as other:
        yield served, other


def _is_no_http(answer: tuple[int, Any] | None) -> bool:
    """Whether this refuses what is no request."""
    return answer is not None and answer[0] == 400 and (answer[1] is None or answer[1]["error"] == "invalid_http")


@pytest.mark.parametrize("seed", range(times(400)))
def test_both_doors_answer_alike(doors: tuple[Served, Served], seed: int) -> None:
    """Whatever comes, and in whatever pieces, both doors give the same answers in the same order."""
    odd = Odd(seed)
    for _ in range(25):
        parts, count = odd.requests()
        ours, others = (exchange(door, parts, count) for door in doors)
        if len(ours) != len(others):  # one of them may have been slow
            ours, others = (exchange(door, parts, count, patience_s=3) for door in doors)
        for mine, other in itertools.zip_longest(ours, others):
            if _is_no_http(mine) or _is_no_http(other) or other is None:
                break  # uvicorn has its own words for what is no HTTP, and may reset the connection before they are read
            assert mine == other, parts
        assert all(status < 500 for status, _ in ours if status != 504), parts
    for door in doors:
        assert door.predict([[1, 2, 3]]).status_code == 200


def test_the_body_of_a_later_request_is_its_own(doors: tuple[Served, Served]) -> None:
    """Of requests behind one another, the last is read while the first is answered: nothing of it gets into another."""
    bodies = [b'{"inputs": [[%d, 0, 0]]}' % number for number in range(3)]
    requests = b"".join(
        b"POST /predict HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n%b" % (len(b), b) for b in bodies
    )
    for cut in range(len(requests) - len(bodies[2]) + 1, len(requests)):
        for door in doors:
            with connect(door) as connection:
                connection.sendall(requests[:cut])
                time.sleep(0.01)
                connection.sendall(requests[cut:])
                data = b""
                while len(answers(data)) < 3:
                    data += connection.recv(1 << 16)
            expected = [door.predict([[number, 0, 0]]).json() for number in range(3)]
            assert answers(data) == [(200, answer) for answer in expected]
