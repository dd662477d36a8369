"""A hundred thousand requests that are right, nearly right, or not, at a service of its own processes."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from emaswap import DirectoryStore
from tests.crew import Crew, memory
from tests.models import Linear
from tests.odd import Odd, exchange
from tests.service.web.test_predict import ROWS, put
from tests.soak import record, times

_CLIENTS = 8


def _ask(crew: Crew, seed: int, count: int) -> list[int]:
    """The statuses of the answers to so many requests."""
    odd, statuses = Odd(seed), list[int]()
    while count > 0:
        parts, requests = odd.requests()
        answers = exchange(crew, parts, requests, patience_s=0.05)
        assert all(status < 500 for status, body in answers if status != 504), (parts, answers)
        statuses += [status for status, _ in answers]
        count -= requests
    return statuses


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_that_comes_is_too_odd(store: DirectoryStore, workers: int) -> None:
    """No 5xx, nobody is stuck, nothing grows, and the log has no traceback."""
    put(store, Linear(), ROWS)
    requests = times(100_000)
    with (
        Crew(store.root, "--max-body-bytes", "20000", workers=workers, fresh=True) as crew,
        ThreadPoolExecutor(_CLIENTS) as pool,
    ):
        early = 0
        statuses: list[int] = []
        for part in range(5):
            each = requests // 5 // _CLIENTS
            for found in pool.map(lambda client: _ask(crew, part * _CLIENTS + client, each), range(_CLIENTS)):  # noqa: B023
                statuses += found
            early = early or memory(crew)
        late = memory(crew)
        assert crew.predict([[1, 2, 3]]).status_code == 200
        bad = [line for line in crew.lines if "Traceback" in line or "worker lost" in line]
        assert not bad, bad[0]
    assert late <= 1.05 * early, (early, late)
    record(
        f"odd requests, {workers} workers",
        requests=requests,
        answers=len(statuses),
        right=statuses.count(200),
        server_errors=0,
        growth=late / early,
    )
