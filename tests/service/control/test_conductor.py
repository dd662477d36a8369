"""The conductor: versions that are broken, or bad by the dozen, and those that take their place."""

import time
from pathlib import Path

from emaswap import DirectoryStore
from emaswap.store.line import Term
from tests import faulty_models
from tests.conftest import Publish
from tests.faulty_models import BREAKS, Moody
from tests.forging import FORGERIES, Forgery, commit
from tests.serving import ADMIN, Served, serve, wait_for

ROW = [[1.0, 2.0, 3.0]]
TRUST = faulty_models.TRUST


def break_live(served: Served) -> None:
    """Have a request break the live version, which nobody could have known of."""
    served.predict([[float(BREAKS), 0.5, 1.0]])


def test_a_version_that_breaks_gives_way_to_the_one_before(store: DirectoryStore, publish: Publish) -> None:
    """The broken version is rejected with the reason, and the one before it is live again."""
    publish()
    publish(Moody())
    with serve(store=str(store.root), trust=TRUST, poll_s=3600) as served:
        served.wait_until_live(2)
        break_live(served)
        served.wait_until_live(1)
        assert served.predict(ROW).headers["X-Model-Version"] == "1"
        state = served.states()[2]
        assert (state["state"], state["reason"]) == ("rejected", "probe_failed")
        assert "this module is broken" in state["detail"]
        assert served.metric('emaswap_rejected_versions_total{reason="probe_failed"}') == 1
        assert served.metric("emaswap_live_version") == 1


def test_a_version_that_broke_does_not_come_back_by_itself(
    store: DirectoryStore, publish: Publish, tmp_path: Path
) -> None:
    """Looks at the store leave it rejected, and the next version goes live."""
    (tmp_path / "token").write_text("correct horse")
    publish()
    module = Moody()
    publish(module)
    with serve(store=str(store.root), trust=TRUST, poll_s=0.05, admin_token_file=tmp_path / "token") as served:
        served.wait_until_live(2)
        break_live(served)
        served.wait_until_live(1)
        for _ in range(5):
            state = served.client.post("/model/refresh", headers=ADMIN).json()
        assert state["live"] == 1
        assert state["status"] == "every version after the live 1 was rejected"
        served.wait_until_live(publish(module).version)


def test_without_another_version_a_broken_one_leaves_the_service_not_ready(
    store: DirectoryStore, publish: Publish
) -> None:
    """As long as nothing can take its place nobody is answered, and the service says so; the next version repairs it."""
    module = Moody()
    publish(module)
    with serve(store=str(store.root), trust=TRUST, poll_s=0.05) as served:
        served.wait_until_live(1)
        break_live(served)
        wait_for(lambda: "rejected" in (served.client.get("/readyz").json()["reason"] or ""), what="not ready")
        assert served.predict(ROW).status_code == 503
        assert served.metric("emaswap_live_version") == 0
        served.wait_until_live(publish(module).version)
        assert served.client.get("/readyz").status_code == 200


def test_a_pinned_version_that_breaks_is_not_replaced(store: DirectoryStore, publish: Publish) -> None:
    """A pin is an order: nothing else goes live in place of the pinned version, and the status says why."""
    publish()
    publish(Moody())
    store.orders.set_pin(2)
    with serve(store=str(store.root), trust=TRUST, poll_s=0.05) as served:
        served.wait_until_live(2)
        break_live(served)
        wait_for(
            lambda: (
                "the pinned version 2 was rejected: probe_failed"
                in (served.client.get("/readyz").json()["reason"] or "")
            ),
            what="not ready",
        )
        store.orders.clear_pin()
        served.wait_until_live(1)


def test_thirty_bad_versions_do_not_keep_the_good_one_waiting_for_polls(store: DirectoryStore) -> None:
    """A service that starts over thirty bad versions serves the good one before them long before its next poll."""
    term = Term(store, "test")
    commit(store, term)
    for _ in range(30):
        commit(store, term, FORGERIES["NaN"])
    began = time.monotonic()
    with serve(store=str(store.root), poll_s=60) as served:
        served.wait_until_live(1)
        assert time.monotonic() - began < 20
        assert served.metric('emaswap_rejected_versions_total{reason="not_finite"}') == 30


def test_hundreds_of_bad_versions_are_tried_newest_first(store: DirectoryStore) -> None:
    """All of them are tried without waiting for a poll, each once, and a good one that comes meanwhile goes live."""
    rubbish = FORGERIES["manifest not JSON"]
    versions = 150
    term = Term(store, "test")
    commit(store, term, rubbish)
    for version in range(2, versions + 1):
        (store.root / "versions" / f"{version:08d}.json").write_bytes(b"version %d" % version)
    rejected = 'emaswap_rejected_versions_total{reason="manifest_invalid"}'
    with serve(store=str(store.root), poll_s=0.5) as served:
        wait_for(lambda: served.metric(rejected) == versions, what="all rejected")
        assert served.states()[versions]["since"] <= served.states()[1]["since"]
        good = commit(store, Term(store, "test"))
        served.wait_until_live(good.version)
        assert served.metric(rejected) == versions


def test_rejections_do_not_keep_what_they_say(store: DirectoryStore, publish: Publish) -> None:
    """Megabytes of detail in a rejection are cut, in what is kept and in what is answered."""
    publish()
    term = Term(store, "test")
    huge = b'{"format": 1, "model": "%s"' % (b"x" * (3 << 20))
    commit(store, term, Forgery(FORGERIES["manifest not JSON"].reason, manifest=lambda _: huge))
    commit(
        store,
        term,
        Forgery(FORGERIES["manifest not JSON"].reason, manifest=lambda _: b'{"%s": 1}' % (b"x" * (3 << 20))),
    )
    with serve(store=str(store.root), poll_s=0.05) as served:
        served.wait_until_rejected(2)
        served.wait_until_live(1)
        assert len(served.client.get("/model/versions").content) < 20_000
