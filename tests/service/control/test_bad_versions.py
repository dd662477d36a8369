"""Versions that are wrong in one respect never go live, whatever that respect is."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from emaswap import DirectoryStore
from emaswap.store.line import Term
from tests.forging import FORGERIES, commit
from tests.serving import ServiceProcess, wait_for


@pytest.fixture(scope="module", params=["1", "2"], ids=["one worker", "two workers"])
def place(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[DirectoryStore, Term, ServiceProcess]]:
    """A store with one good version, the term that fills it, and a service over it."""
    folder: Path = tmp_path_factory.mktemp("bad")
    store = DirectoryStore(folder / "store")
    term = Term(store, "test")
    commit(store, term)
    with ServiceProcess(store.root, "--poll-s", "0.1", "--workers", request.param) as service:
        yield store, term, service


@pytest.mark.parametrize("name", FORGERIES)
def test_a_bad_version_is_rejected_with_its_own_reason_and_the_next_good_one_goes_live(
    place: tuple[DirectoryStore, Term, ServiceProcess], name: str
) -> None:
    """The reason stands in `/model/versions`, in the log and in a metric, while the old version goes on answering."""
    store, term, service = place
    forgery = FORGERIES[name]
    good = service.live()
    sample = f'emaswap_rejected_versions_total{{reason="{forgery.reason}"}}'
    before = service.metric(sample)

    commit(store, term, forgery)
    bad = term.version
    state = service.wait_until_rejected(bad)
    assert state["reason"] == forgery.reason
    assert state["detail"]
    assert service.metric(sample) == before + 1
    logged = wait_for(lambda: [e for e in service.events("version rejected") if e["version"] == bad])
    assert [event["reason"] for event in logged] == [forgery.reason]
    answer = service.predict([[1, 2, 3]])
    assert answer.status_code == 200
    assert answer.json()["model"]["version"] == good
    assert service.client.get("/readyz").status_code == 200

    commit(store, term)
    service.wait_until_live(term.version)
    assert service.predict([[1, 2, 3]]).json()["model"]["version"] == term.version == bad + 1
