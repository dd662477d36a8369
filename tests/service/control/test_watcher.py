"""The service and its store: what it finds, what it refuses, what it does when the store lies, breaks or goes away."""

import json
import math
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from emaswap import Architecture, DirectoryStore, Manifest, Publisher
from emaswap.store.keys import manifest_key, tensors_key
from tests.conftest import Publish
from tests.models import Linear
from tests.serving import ADMIN, Served, serve, wait_for
from tests.slow_models import TRUST, Gated, gate

ROW = [[1.0, 2.0, 3.0]]
FAST = {"poll_s": 0.05}


def commit(store: DirectoryStore, manifest: Manifest, **changes: Any) -> Manifest:
    """Commit a manifest like another one, and tell nobody."""
    changed = manifest.model_copy(update=changes)
    assert store.files.create(manifest_key(changed.version), changed.encode())
    return changed


@dataclass(frozen=True)
class Lasting:
    """A service and its store, for several tests."""

    served: Served
    store: DirectoryStore

    def commit_next(self) -> int:
        """Commit a version that is as good as the first; its number."""
        return commit(self.store, self.store.manifest(1), version=self.store.newest() + 1).version


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lasting]:
    """A service and its store, whose versions go on from test to test."""
    folder = tmp_path_factory.mktemp("lasting")
    (folder / "token").write_text("correct horse")
    store = DirectoryStore(folder / "store")
    with Publisher(store, name="test", architecture=Architecture.of(Linear), probe=torch.ones(2, 3)) as publisher:
        publisher.publish(Linear())
    with serve(store=str(store.root), admin_token_file=folder / "token", **FAST) as served:
        served.wait_until_live(1)
        yield Lasting(served, store)


def weights_of(store: DirectoryStore, manifest: Manifest) -> Path:
    """The file of a version's weights."""
    return store.root / tensors_key("weights", manifest.weights.digest)


def flip_a_bit(path: Path) -> bytes:
    """Change one bit near the end of a file; the bytes that were right."""
    right = path.read_bytes()
    wrong = bytearray(right)
    wrong[-1] ^= 1
    path.write_bytes(wrong)
    return right


def refresh(served: Served) -> dict[str, Any]:
    """Have the service look at its store now."""
    answer = served.client.post("/model/refresh", headers=ADMIN)
    assert answer.status_code == 200, answer.text
    state: dict[str, Any] = answer.json()
    return state


def wait_for_status(served: Served, text: str) -> None:
    """Return once the watcher's conclusion has this text in it."""
    wait_for(lambda: text in served.client.get("/model/versions").json()["status"], what=f"status {text!r}")


def wait_for_store_error(served: Served) -> None:
    """Return once another look at the store has failed."""
    before = served.metric("emaswap_store_errors_total")
    wait_for(lambda: served.metric("emaswap_store_errors_total") > before, what="a store error")


def assert_answers_with(served: Served, version: int) -> None:
    """A request is answered, by this version."""
    answer = served.predict(ROW)
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Model-Version"] == str(version)


# -- finding versions -----------------------------------------------------------------------------------------------------


def test_a_version_without_its_hint_is_found(served: Served, store: DirectoryStore, publish: Publish) -> None:
    """A publisher that died between its commit and CURRENT has published all the same."""
    first = publish()
    served.wait_until_live(1)
    (store.root / "CURRENT").unlink()
    commit(store, first, version=2)
    served.wait_until_live(2)


def write(data: bytes) -> Callable[[Path], object]:
    """Writes a file."""
    return lambda path: path.write_bytes(data)


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(write(b'{"version": 999}'), id="a version that is not there"),
        pytest.param(write(b'{"version": 1000000000000000}'), id="the highest version there can be"),
        pytest.param(write(b'{"version": -1}'), id="a negative version"),
        pytest.param(write(b'{"version": 1e300}'), id="a version beyond all"),
        pytest.param(write(b""), id="nothing"),
        pytest.param(write(b"\xff\x00rubbish"), id="rubbish"),
        pytest.param(write(b"[" * 60_000), id="brackets"),
        pytest.param(write(b" " * (1 << 20)), id="a megabyte"),
        pytest.param(lambda path: path.symlink_to("/etc/passwd"), id="a link"),
        pytest.param(lambda path: path.symlink_to(path), id="a link to itself"),
        pytest.param(lambda path: path.mkdir(), id="a folder"),
        pytest.param(os.mkfifo, id="a pipe"),
    ],
)
def test_a_hint_that_lies_does_no_harm(lasting: Lasting, lie: Callable[[Path], object]) -> None:
    """Whatever CURRENT is, versions are found and no look at the store fails."""
    current = lasting.store.root / "CURRENT"
    current.unlink(missing_ok=True)
    lie(current)
    try:
        errors = lasting.served.metric("emaswap_store_errors_total")
        version = lasting.commit_next()
        assert refresh(lasting.served)["live"] == version
        assert lasting.served.metric("emaswap_store_errors_total") == errors
    finally:
        current.rmdir() if current.is_dir() else current.unlink()


@pytest.mark.parametrize(
    "name",
    [
        "000000099.json",
        "99.json",
        "\u0660\u0660\u0660\u0660\u0660\u0660\u0669\u0669.json",
        "00000099.json.bak",
        ".nfs99",
    ],
)
def test_what_only_looks_like_a_version_is_none(
    served: Served, store: DirectoryStore, publish: Publish, name: str
) -> None:
    """A stray file among the manifests keeps no version from going live."""
    first = publish()
    served.wait_until_live(1)
    (store.root / "versions" / name).write_bytes(first.encode())
    commit(store, first, version=2)
    assert refresh(served)["live"] == 2
    assert served.states().keys() == {1, 2}


def test_versions_that_come_in_one_go_are_not_all_loaded(store: DirectoryStore, publish: Publish) -> None:
    """A service that starts over many versions loads the newest, and only lists the others."""
    for _ in range(4):
        publish()
    with serve(store=str(store.root), **FAST) as served:
        served.wait_until_live(4)
        assert [served.states()[version]["state"] for version in (4, 3, 2, 1)] == ["live", *["discovered"] * 3]
        assert served.metric("emaswap_swaps_total") == 1


# -- the store comes and goes -----------------------------------------------------------------------------------------------


def test_a_store_may_appear_after_the_service(store: DirectoryStore, publish: Publish, tmp_path: Path) -> None:
    """A service over a directory that is not there yet says so, and serves as soon as there is a version in it."""
    later = tmp_path / "not" / "yet"
    with serve(store=str(later), **FAST) as served:
        wait_for_store_error(served)
        ready = served.client.get("/readyz")
        assert ready.status_code == 503
        assert "does not exist" in ready.json()["reason"]
        assert served.predict(ROW).status_code == 503
        publish()
        later.parent.mkdir()
        store.root.rename(later)
        served.wait_until_live(1)
        assert served.client.get("/readyz").status_code == 200


def test_a_live_version_is_not_in_a_store_that_is_gone(served: Served, store: DirectoryStore, publish: Publish) -> None:
    """As long as the whole store is away, nobody says that it has the live version."""
    served.wait_until_live(publish().version)
    store.root.rename(store.root.with_name("away"))
    wait_for(lambda: served.metric("emaswap_live_in_store") == 0, what="the store seen to be gone")
    assert served.client.get("/model/version").json()["in_store"] is False
    store.root.with_name("away").rename(store.root)
    wait_for(lambda: served.metric("emaswap_live_in_store") == 1, what="the store seen again")


def test_a_store_may_vanish_and_come_back(
    served: Served, store: DirectoryStore, publish: Publish, tmp_path: Path
) -> None:
    """Without its store the live version goes on, errors are counted and the weights grow old; then all is well again."""
    publish()
    served.wait_until_live(1)
    store.root.rename(tmp_path / "away")
    wait_for_store_error(served)
    assert_answers_with(served, 1)
    assert served.client.get("/readyz").status_code == 200
    assert "does not exist" in served.client.get("/model/versions").json()["status"]
    age_s = served.metric("emaswap_live_age_seconds")
    wait_for_store_error(served)
    assert served.metric("emaswap_live_age_seconds") > age_s
    (tmp_path / "away").rename(store.root)
    served.wait_until_live(publish().version)
    assert_answers_with(served, 2)


@pytest.mark.parametrize("kind", ["file", "link loop", "long name", "no UTF-8"])
def test_what_is_no_store_is_told_in_a_sentence(tmp_path: Path, kind: str) -> None:
    """The status says what is wrong with the path, every look that fails is counted, and the log tells it once."""
    path = tmp_path / ("x" * 300 if kind == "long name" else os.fsdecode(b"\xff") if kind == "no UTF-8" else "store")
    if kind == "file":
        path.touch()
    elif kind == "link loop":
        path.symlink_to(path)
    with serve(store=str(path), **FAST) as served, structlog.testing.capture_logs() as entries:
        wait_for_store_error(served)
        wait_for_store_error(served)
        answer = served.client.get("/readyz")
        assert answer.status_code == 503
        assert {"file": "is no directory", "no UTF-8": "does not exist"}.get(kind, "cannot be reached") in answer.text
        assert [entry for entry in entries if "exception" in entry or entry["log_level"] == "error"] == []


def test_a_store_that_is_suddenly_empty_takes_nothing_away(
    served: Served, store: DirectoryStore, publish: Publish, tmp_path: Path
) -> None:
    """When an empty directory stands where the store was (its file system is not mounted), the live version goes on."""
    publish()
    served.wait_until_live(1)
    store.root.rename(tmp_path / "away")
    store.root.mkdir()
    wait_for_status(served, "the store has no versions any more; still serving version 1")
    assert_answers_with(served, 1)
    store.root.rmdir()
    (tmp_path / "away").rename(store.root)
    served.wait_until_live(publish().version)


def test_a_pin_holds_while_the_store_is_away(
    served: Served, store: DirectoryStore, publish: Publish, tmp_path: Path
) -> None:
    """A store that cannot be read is no reason to forget its pin, nor to leave the pinned version."""
    for _ in range(2):
        served.wait_until_live(publish().version)
    assert served.client.post("/model/pin", json={"version": 1}, headers=ADMIN).json()["live"] == 1
    store.root.rename(tmp_path / "away")
    wait_for_store_error(served)
    assert served.client.get("/model/versions").json()["pin"]["version"] == 1
    (tmp_path / "away").rename(store.root)
    state = refresh(served)
    assert (state["live"], state["pin"]["version"]) == (1, 1)
    assert served.metric("emaswap_swaps_total") == 3


# -- rejected -----------------------------------------------------------------------------------------------------------------


def test_a_rejected_version_is_told_with_its_reason(store: DirectoryStore, publish: Publish) -> None:
    """A bad version is not served; the state, the reason, the metric and the live version tell what happened."""
    publish()
    flip_a_bit(weights_of(store, publish()))
    with serve(store=str(store.root), **FAST) as served:
        served.wait_until_live(1)
        state = served.states()[2]
        assert state["state"] == "rejected"
        assert state["reason"] == "digest_mismatch"
        assert "expected blake3:" in state["detail"]
        assert served.metric('emaswap_rejected_versions_total{reason="digest_mismatch"}') == 1
        assert served.metric("emaswap_live_version") == 1
        assert served.metric("emaswap_newest_version") == 2
        assert_answers_with(served, 1)


def test_after_a_rejected_version_the_next_good_one_goes_live(
    served: Served, store: DirectoryStore, publish: Publish
) -> None:
    """A bad version does not stand in the way of the one after it."""
    first = publish()
    bad = first.weights.model_copy(update={"size": first.weights.size + 1})
    commit(store, first, version=2, weights=bad)
    served.wait_until_rejected(2)
    commit(store, first, version=3)
    served.wait_until_live(3)
    assert served.states()[2]["reason"] == "size_mismatch"


def test_a_repaired_version_is_tried_again(store: DirectoryStore, tmp_path: Path, publish: Publish) -> None:
    """When the right bytes come to a rejected version's file, it goes live, and no reason is left."""
    publish()
    path = weights_of(store, publish())
    right = flip_a_bit(path)
    with serve(store=str(store.root), **FAST) as served:
        served.wait_until_rejected(2)
        served.wait_until_live(1)
        (tmp_path / "right").write_bytes(right)
        (tmp_path / "right").replace(path)
        served.wait_until_live(2)
        state = served.states()[2]
        assert (state["state"], state["reason"], state["detail"]) == ("live", None, None)


def test_a_version_that_was_restored_as_it_was_is_tried_again(store: DirectoryStore, publish: Publish) -> None:
    """Bytes that are put back into the same file with its old time of modification are noticed, too."""
    publish()
    path = weights_of(store, publish())
    found = path.stat()
    right = flip_a_bit(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    with serve(store=str(store.root), **FAST) as served:
        served.wait_until_rejected(2)
        path.write_bytes(right)
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
        served.wait_until_live(2)


@pytest.mark.parametrize("folder", ["weights", "probes", "versions"])
def test_a_folder_that_was_a_link_for_a_while_is_looked_at_again(
    store: DirectoryStore, tmp_path: Path, publish: Publish, folder: str
) -> None:
    """What is moved back into the store is the same files, and yet they can be read again."""
    publish()
    (store.root / folder).rename(tmp_path / "elsewhere")
    (store.root / folder).symlink_to(tmp_path / "elsewhere")
    with serve(store=str(store.root), **FAST) as served:
        assert served.wait_until_rejected(1)["reason"] == "not_a_file"
        (store.root / folder).unlink()
        (tmp_path / "elsewhere").rename(store.root / folder)
        served.wait_until_live(1)


def test_a_version_whose_weights_come_late_is_tried_again(
    served: Served, store: DirectoryStore, publish: Publish, tmp_path: Path
) -> None:
    """A file that was missing when the version was rejected, and then comes, makes it go live."""
    first, second = publish(), publish()
    served.wait_until_live(2)
    path = weights_of(store, second)
    path.rename(tmp_path / "late")
    commit(store, first, version=3, weights=second.weights, probe=second.probe)
    assert served.wait_until_rejected(3)["reason"] == "file_missing"
    (tmp_path / "late").rename(path)
    served.wait_until_live(3)


def test_a_rejected_version_is_not_tried_again_for_nothing(
    store: DirectoryStore, tmp_path: Path, publish: Publish
) -> None:
    """As long as its bytes are what they were, a rejected version is rejected once, however often the store is looked at."""
    publish()
    flip_a_bit(weights_of(store, publish()))
    (tmp_path / "token").write_text("correct horse")
    with serve(store=str(store.root), admin_token_file=tmp_path / "token", **FAST) as served:
        since = served.wait_until_rejected(2)["since"]
        for _ in range(10):
            refresh(served)
        assert served.metric('emaswap_rejected_versions_total{reason="digest_mismatch"}') == 1
        assert served.states()[2]["since"] == since


def test_a_pin_on_a_rejected_version_is_said_once(store: DirectoryStore, tmp_path: Path, publish: Publish) -> None:
    """The status says why the pinned version is not live; the log does not say so again at every look."""
    publish()
    flip_a_bit(weights_of(store, publish()))
    (tmp_path / "token").write_text("correct horse")
    with serve(store=str(store.root), admin_token_file=tmp_path / "token", **FAST) as served:
        served.wait_until_rejected(2)
        (store.root / "PIN").write_text('{"version": 2, "at": "2026-01-01T00:00:00Z"}')
        status = refresh(served)["status"]
        assert "the pinned version 2 was rejected" in status
        assert "digest_mismatch" in status
        with structlog.testing.capture_logs() as entries:
            for _ in range(10):
                refresh(served)
        assert [entry for entry in entries if entry["event"] == "watching"] == []


def test_a_replaced_publishers_version_is_rejected(served: Served, store: DirectoryStore, publish: Publish) -> None:
    """A version of a lower term than one before it comes from a publisher that was replaced, and does not go live."""
    publish()
    with Publisher(
        store, name="test", architecture=Architecture.of(Linear), probe=torch.linspace(-1, 1, 12).view(4, 3)
    ) as successor:
        successor.publish(Linear())
    served.wait_until_live(2)
    second = store.manifest(2)
    assert second.term == 2
    commit(store, second, version=3, term=1)
    assert served.wait_until_rejected(3)["reason"] == "stale_term"
    assert_answers_with(served, 2)
    commit(store, second, version=4)
    served.wait_until_live(4)


@pytest.mark.parametrize("kind", ["stale_term", "out_of_line"])
def test_what_only_a_pin_let_go_live_is_replaced_without_it(
    store: DirectoryStore, tmp_path: Path, publish: Publish, kind: str
) -> None:
    """Unpinned, the newest version in the line is live at once, as in a service that starts then; so are later ones."""
    with Publisher(store, name="test", architecture=Architecture.of(Linear), probe=torch.ones(2, 3)) as publisher:
        publisher.publish(Linear())
    publish()
    odd = 3 if kind == "stale_term" else 5 * 10**12
    commit(store, store.manifest(2), version=odd, term=1)
    (tmp_path / "token").write_text("correct horse")
    with serve(store=str(store.root), admin_token_file=tmp_path / "token", **FAST) as served:
        assert served.wait_until_rejected(odd)["reason"] == kind
        assert served.client.post("/model/pin", json={"version": odd}, headers=ADMIN).json()["live"] == odd
        assert served.client.delete("/model/pin", headers=ADMIN).json()["live"] == 2
        assert_answers_with(served, 2)
        assert served.client.post("/model/pin", json={"version": odd}, headers=ADMIN).json()["live"] == odd
        assert served.client.delete("/model/pin", headers=ADMIN).json()["live"] == 2


# -- one version after another ------------------------------------------------------------------------------------------------


def test_a_version_that_no_longer_answers_is_freed(served: Served, publish: Publish) -> None:
    """After a swap nothing holds on to the old weights, and the old version is shown as retired."""
    served.wait_until_live(publish().version)
    assert_answers_with(served, 1)
    live = served.service.slot.current
    assert live is not None
    servable, weights = weakref.ref(live), weakref.ref(live.module)
    del live
    served.wait_until_live(publish().version)
    wait_for(lambda: servable() is None and weights() is None, what="the old version freed")
    wait_for(lambda: served.states()[1]["state"] == "retired", what="version 1 retired")
    assert served.states()[2]["state"] == "live"


def test_a_version_finishes_what_it_has_begun(store: DirectoryStore) -> None:
    """A request that runs when the swap comes is answered by the version it ran on, which is `previous` until then."""
    with Publisher(store, name="test", architecture=Architecture.of(Gated), probe=torch.ones(2, 3)) as publisher:
        publisher.publish(Gated())
    with (
        serve(store=str(store.root), trust=TRUST, **FAST) as served,
        ThreadPoolExecutor(1) as threads,
    ):
        served.wait_until_live(1)
        with gate.closed():
            running = threads.submit(served.predict, ROW)
            gate.wait_until_reached()
            with Publisher(
                store, name="test", architecture=Architecture.of(Linear, inputs=4), probe=torch.ones(2, 4)
            ) as publisher:
                publisher.publish(Linear(inputs=4))
            served.wait_until_live(2)
            assert served.states()[1]["state"] == "previous"
            gate.open()
            assert running.result(30).headers["X-Model-Version"] == "1"
            wait_for(lambda: served.states()[1]["state"] == "retired", what="version 1 retired")


def test_a_version_that_returns_is_live_again(served: Served, publish: Publish) -> None:
    """A version that was left and comes back by a pin is live, and not taken for retired."""
    for _ in range(2):
        served.wait_until_live(publish().version)
    for version in (1, 2, 1, 2):
        served.client.post("/model/pin", json={"version": version}, headers=ADMIN)
        assert_answers_with(served, version)
        assert served.states()[version]["state"] == "live"
    wait_for(lambda: served.states()[1]["state"] == "retired", what="version 1 retired")
    assert served.states()[2]["state"] == "live"


# -- what is shown --------------------------------------------------------------------------------------------------------------


def test_before_the_first_version_the_service_is_alive_but_not_ready(served: Served) -> None:
    """An empty store is no fault: alive, not ready and why, nothing live, no age."""
    wait_for_status(served, "there is no version in the store yet")
    assert served.client.get("/healthz").json() == {"status": "alive"}
    ready = served.client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json() == {"ready": False, "version": None, "reason": "there is no version in the store yet"}
    assert served.client.get("/model/version").status_code == 503
    assert served.client.get("/model/versions").json() == {
        "live": None,
        "pin": None,
        "status": "there is no version in the store yet",
        "versions": [],
    }
    assert math.isnan(served.metric("emaswap_live_age_seconds"))
    for name in ("live_version", "newest_version", "pinned_version", "swaps_total", "store_errors_total"):
        assert served.metric(f"emaswap_{name}") == 0


def test_with_a_live_version_the_service_is_ready(served: Served, publish: Publish) -> None:
    """Readiness, version, age, freshness and the time of each stage are told once a version is live."""
    manifest = publish(step=40)
    served.wait_until_live(1)
    assert served.client.get("/healthz").json() == {"status": "alive"}
    ready = served.client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json() == {"ready": True, "version": 1, "reason": None}
    version = served.client.get("/model/version").json()
    assert (version["version"], version["step"], version["digest"]) == (1, 40, manifest.weights.digest)
    assert (version["term"], version["run"], version["pin"]) == (1, manifest.run, None)
    assert version["size_bytes"] == manifest.weights.size
    assert 0 <= version["publish_to_served_s"] <= version["age_s"]
    assert version["signature"] == json.loads(manifest.signature.model_dump_json())
    assert served.metric("emaswap_live_version") == 1
    assert served.metric("emaswap_live_step") == 40
    assert served.metric("emaswap_swaps_total") == 1
    assert served.metric("emaswap_publish_to_served_seconds_count") == 1
    assert 0 <= served.metric("emaswap_live_age_seconds") < 60
    for stage in ("fetching", "verifying", "warming"):
        assert served.metric(f'emaswap_load_seconds_count{{stage="{stage}"}}') == 1
        assert served.states()[1]["timings_s"][stage] > 0


def test_drift_is_measured_against_the_version_before(served: Served, publish: Publish) -> None:
    """The first version has no drift; the same weights again have none to speak of; other weights have some."""
    module = Linear()
    publish(module)
    served.wait_until_live(1)
    assert served.client.get("/model/version").json()["drift"] is None
    publish(module)
    served.wait_until_live(2)
    assert served.client.get("/model/version").json()["drift"] == 0
    with torch.no_grad():
        module.layer.bias.add_(1)
    publish(module)
    served.wait_until_live(3)
    assert served.client.get("/model/version").json()["drift"] == pytest.approx(1)
    assert served.metric("emaswap_drift") == pytest.approx(1)


# -- the pin --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rubbish",
    [
        pytest.param(write(b""), id="nothing"),
        pytest.param(write(b"\xffrubbish"), id="rubbish"),
        pytest.param(write(b'{"version": 0, "at": "2026-01-01T00:00:00Z"}'), id="version 0"),
        pytest.param(write(b'{"version": 1}'), id="no time"),
        pytest.param(write(b" " * (1 << 20)), id="a megabyte"),
        pytest.param(lambda path: path.symlink_to("CURRENT"), id="a link"),
        pytest.param(os.mkfifo, id="a pipe"),
    ],
)
def test_a_pin_that_cannot_be_understood_keeps_the_live_version(
    lasting: Lasting, rubbish: Callable[[Path], object]
) -> None:
    """Nobody knows what was ordered, so nothing changes and the status says so, until the pin is made anew or removed."""
    served = lasting.served
    live = refresh(served)["live"]
    errors = served.metric("emaswap_store_errors_total")
    rubbish(lasting.store.root / "PIN")
    newest = lasting.commit_next()
    state = refresh(served)
    assert state["live"] == live
    assert "PIN" in state["status"]
    assert served.client.get("/readyz").status_code == 200
    assert served.metric("emaswap_store_errors_total") > errors
    answer = served.client.delete("/model/pin", headers=ADMIN)
    assert answer.status_code == 200, answer.text
    assert answer.json()["live"] == newest


def test_a_pin_on_a_version_that_is_gone_keeps_the_live_version(
    served: Served, store: DirectoryStore, publish: Publish
) -> None:
    """A pin on what is not in the store changes nothing, and the status says so."""
    served.wait_until_live(publish().version)
    (store.root / "PIN").write_text('{"version": 9, "at": "2026-01-01T00:00:00Z"}')
    publish()
    assert refresh(served)["status"] == "the pinned version 9 is not in the store"
    assert_answers_with(served, 1)
