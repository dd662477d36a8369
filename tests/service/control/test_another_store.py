"""A version is its number and its manifest: what becomes of a service when another store stands where its own was."""

import json
import math
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog

from emaswap import DirectoryStore, Manifest
from emaswap.files.digest import digest_of
from emaswap.store.directory import Directory
from emaswap.store.line import Term
from tests.conftest import Publish
from tests.forging import FORGERIES, commit
from tests.serving import ADMIN, Served, serve, wait_for

ROW = [[1.0, 2.0, 3.0]]


def begin_run(root: Path, versions: int = 1) -> list[Manifest]:
    """Let a new run publish versions into a store of its own."""
    store = DirectoryStore(root)
    term = Term(store, "test")
    return [commit(store, term) for _ in range(versions)]


def begin_anew(root: Path, versions: int = 1) -> list[Manifest]:
    """Delete a store, and let a new run publish versions in its place."""
    shutil.rmtree(root)
    return begin_run(root, versions)


def answers_with(served: Served, manifest: Manifest) -> bool:
    """Whether the service answers with just this version, by number and weights."""
    answer = served.predict(ROW)
    assert answer.status_code == 200, answer.text
    model = answer.json()["model"]
    return (model["version"], model["digest"]) == (manifest.version, manifest.weights.digest)


def wait_until_answered_by(served: Served, manifest: Manifest) -> None:
    """Return once this version answers, and see that everything tells of it and that nothing is loaded again."""
    wait_for(lambda: answers_with(served, manifest), what=f"answers by {manifest.identity}")
    live = served.client.get("/model/version").json()
    assert live["version"] == manifest.version
    assert live["manifest_digest"] == manifest.identity.digest
    wait_for(lambda: served.metric("emaswap_live_version") == manifest.version)
    wait_for(lambda: served.metric("emaswap_newest_version") == manifest.version)
    assert served.metric("emaswap_live_in_store") == 1
    wait_for(lambda: f"version {manifest.version} is live" in refresh(served)["status"], what="a settled status")
    swaps = served.metric("emaswap_swaps_total")
    for _ in range(5):
        refresh(served)
    assert served.metric("emaswap_swaps_total") == swaps


def refresh(served: Served) -> dict[str, Any]:
    """Have the service look at its store now."""
    state: dict[str, Any] = served.client.post("/model/refresh", headers=ADMIN).json()
    return state


@pytest.mark.parametrize("versions", [1, 3, 5], ids=["fewer versions", "as many", "more"])
def test_a_run_in_a_store_begun_anew_goes_live(
    served: Served, store: DirectoryStore, publish: Publish, versions: int
) -> None:
    """Whatever its numbers are, the newest version of the new run is served."""
    for _ in range(3):
        served.wait_until_live(publish().version)
    wait_until_answered_by(served, begin_anew(store.root, versions)[-1])


def test_the_new_run_goes_on(served: Served, store: DirectoryStore, publish: Publish) -> None:
    """After the change, versions follow one another as ever."""
    for _ in range(2):
        served.wait_until_live(publish().version)
    shutil.rmtree(store.root)
    term = Term(store, "test")
    for _ in range(4):
        wait_until_answered_by(served, commit(store, term))


def test_a_version_of_the_old_run_is_not_taken_for_one_of_the_new(
    served: Served, store: DirectoryStore, publish: Publish
) -> None:
    """A pin of a number that only the old run had is refused, and the states are those of the new run's versions."""
    for _ in range(6):
        served.wait_until_live(publish().version)
    wait_until_answered_by(served, begin_anew(store.root, 2)[-1])
    answer = served.client.post("/model/pin", json={"version": 6}, headers=ADMIN)
    assert answer.status_code == 404
    assert "from 1 to 2" in answer.json()["detail"]
    states = served.states()
    assert states[2]["state"] == "live"
    assert states[1]["state"] in ("discovered", "retired")
    assert states[1]["manifest_digest"] in (None, store.manifest(1).identity.digest)


def test_a_store_restored_from_a_backup_is_believed(
    served: Served, store: DirectoryStore, publish: Publish, tmp_path: Path
) -> None:
    """When the store is as it was some versions ago, the newest version there is served, and then what follows it."""
    served.wait_until_live(publish().version)
    second = publish()
    served.wait_until_live(2)
    shutil.copytree(store.root, tmp_path / "backup")
    for _ in range(2):
        served.wait_until_live(publish().version)
    shutil.rmtree(store.root)
    (tmp_path / "backup").rename(store.root)
    wait_until_answered_by(served, second)
    wait_until_answered_by(served, commit(store, Term(store, "test")))


def test_a_link_that_is_turned_to_another_store_is_followed(tmp_path: Path) -> None:
    """A service over a link serves what the link leads to now, though the numbers are the same."""
    first, second = begin_run(tmp_path / "first", 3)[-1], begin_run(tmp_path / "second", 3)[-1]
    (tmp_path / "token").write_text("correct horse")
    link, turned = tmp_path / "link", tmp_path / "turned"
    link.symlink_to("first")
    with serve(store=str(link), poll_s=0.05, admin_token_file=tmp_path / "token") as served:
        served.wait_until_live(first.version)
        wait_until_answered_by(served, first)
        turned.symlink_to("second")
        turned.replace(link)
        wait_until_answered_by(served, second)


@pytest.mark.parametrize(
    "replace",
    [
        pytest.param(lambda path, data: path.write_bytes(data), id="in place"),
        pytest.param(lambda path, data: (path.unlink(), path.write_bytes(data)), id="anew"),
    ],
)
def test_the_same_number_with_another_manifest_is_another_version(
    served: Served, store: DirectoryStore, publish: Publish, replace: Callable[[Path, bytes], object]
) -> None:
    """A manifest that was replaced, against all rules, is noticed, and its version is served."""
    first, second = publish(), publish()
    served.wait_until_live(2)
    replaced = first.model_copy(update={"version": 2, "run": second.run, "term": second.term})
    replace(store.root / "versions" / "00000002.json", replaced.encode())
    wait_until_answered_by(served, store.manifest(2))
    assert store.manifest(2).weights.digest == first.weights.digest


def test_a_manifest_that_is_only_written_again_changes_nothing(
    served: Served, store: DirectoryStore, publish: Publish
) -> None:
    """The same bytes are the same version, whatever the file's time says."""
    publish()
    served.wait_until_live(1)
    path = store.root / "versions" / "00000001.json"
    path.write_bytes(path.read_bytes())
    for _ in range(5):
        assert refresh(served)["status"] == "the newest version 1 is live"
    assert served.metric("emaswap_swaps_total") == 1
    assert list(served.states()) == [1]


def test_when_no_version_of_the_new_run_can_go_live_the_old_one_answers(
    served: Served, store: DirectoryStore, publish: Publish
) -> None:
    """The status and the metrics say that what is served is not in the store any more."""
    for _ in range(2):
        served.wait_until_live(publish().version)
    old = store.manifest(2)
    shutil.rmtree(store.root)
    commit(store, Term(store, "test"), FORGERIES["NaN"])
    wait_for(lambda: served.metric("emaswap_live_in_store") == 0)
    assert answers_with(served, old)
    assert refresh(served)["status"].startswith(
        "all 1 versions in the store were rejected; still serving version 2, which is no longer in the store: not_finite"
    )
    assert served.client.get("/model/version").json()["in_store"] is False
    assert served.metric("emaswap_live_version") == 2
    assert served.metric("emaswap_newest_version") == 1


def test_a_store_that_is_emptied_takes_nothing_away(served: Served, store: DirectoryStore, publish: Publish) -> None:
    """The live version keeps answering, and it is said that the store has no versions any more."""
    served.wait_until_live(publish().version)
    shutil.rmtree(store.root / "versions")
    (store.root / "versions").mkdir()
    wait_for(lambda: "no versions any more" in refresh(served)["status"])
    assert refresh(served)["status"] == "the store has no versions any more; still serving version 1"
    assert served.metric("emaswap_live_in_store") == 0
    assert served.client.get("/readyz").status_code == 200


def test_a_pin_does_not_mean_another_version_of_its_number(
    served: Served, store: DirectoryStore, publish: Publish, tmp_path: Path
) -> None:
    """A pin that came into a store begun anew, with the digest of what was pinned, pins nothing there and says so."""
    for _ in range(2):
        served.wait_until_live(publish().version)
    assert served.client.post("/model/pin", json={"version": 1}, headers=ADMIN).json()["live"] == 1
    pin = (store.root / "PIN").read_bytes()
    assert json.loads(pin)["digest"] == digest_of((store.root / "versions" / "00000001.json").read_bytes())
    old = store.manifest(1)
    store.root.rename(tmp_path / "old")  # all at once: without its pin, version 2 would be the one to serve
    store.prepare()
    (store.root / "PIN").write_bytes(pin)
    begin_run(store.root, 2)
    wait_for(lambda: refresh(served)["status"] == "the pinned version 1 is live; it is no longer in the store")
    assert answers_with(served, old)
    with serve(store=str(store.root), poll_s=0.05) as another:
        wait_for(lambda: "another version has its number" in another.client.get("/readyz").json()["reason"])
        assert another.live() is None


def test_a_manifest_from_the_future_makes_no_age_negative(
    served: Served, store: DirectoryStore, publish: Publish
) -> None:
    """Two hours of skew show in a metric and in one line of the log, and nowhere as a negative age."""
    first = publish()
    with structlog.testing.capture_logs() as entries:
        for version in (2, 3):
            ahead = first.model_copy(update={"version": version, "created_at": datetime.now(UTC) + timedelta(hours=2)})
            assert store.commit(version, ahead.encode())
            served.wait_until_live(version)
            live = served.client.get("/model/version").json()
            assert (live["age_s"], live["publish_to_served_s"]) == (0, 0)
            assert served.metric("emaswap_live_age_seconds") == 0
            assert served.metric("emaswap_publish_to_served_seconds_sum") < 60
            assert math.isclose(served.metric("emaswap_clock_skew_seconds"), 7200, abs_tol=60)
    assert len([entry for entry in entries if "clock is ahead" in entry["event"]]) == 1
    served.wait_until_live(publish_after(store, first, 4).version)
    assert served.metric("emaswap_clock_skew_seconds") == 0


def publish_after(store: DirectoryStore, manifest: Manifest, version: int) -> Manifest:
    """Commit a version like another one, with a clock that goes right."""
    later = manifest.model_copy(update={"version": version, "created_at": datetime.now(UTC)})
    assert store.commit(version, later.encode())
    return later


def test_a_look_lists_the_store_once_and_a_swap_not_at_all(
    store: DirectoryStore, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a bucket a listing costs money: a refresh that loads a version takes one, and so does one that finds nothing."""
    (tmp_path / "token").write_text("correct horse")
    first = publish()
    listings: list[str] = []
    real = Directory.entries

    def entries(self: Directory, folder: str) -> Any:
        if folder == "versions":
            listings.append(folder)
        return real(self, folder)

    with serve(store=str(store.root), admin_token_file=tmp_path / "token", poll_s=3600) as served:
        served.wait_until_live(1)
        wait_for(lambda: refresh(served)["status"] == "the newest version 1 is live")
        publish_after(store, first, 2)
        monkeypatch.setattr(Directory, "entries", entries)
        assert refresh(served)["live"] == 2
        assert len(listings) == 1
        refresh(served)
        assert len(listings) == 2
