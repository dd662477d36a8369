"""Versions that cannot be loaded for now: what is short, unreadable or hangs is passed over, and tried again."""

import resource
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from torch import nn

from emaswap import Architecture, DirectoryStore, Manifest, Unreadable
from emaswap.files.digest import digest_of, stem_of
from emaswap.files.tensor_file import Blob
from emaswap.store.directory import Directory
from emaswap.store.line import Place, Term
from emaswap.versions.manifest import TensorInfo, WeightsInfo
from tests.conftest import Publish
from tests.forging import commit
from tests.models import Linear
from tests.publishing.test_variants import published
from tests.serving import ADMIN, Served, ServiceProcess, serve, wait_for
from tests.troubled_models import SHORTAGES, TRUST, Troubled, Untroubled, trouble

HERE = "tests.service.control.*"
ROW = [[1.0, 2.0, 3.0]]


@pytest.fixture(autouse=True)
def trouble_ends() -> Iterator[None]:
    """Whatever trouble a test makes, it ends with it."""
    yield
    trouble.factory = trouble.forward = None
    trouble.factory_hangs = trouble.forward_hangs = False
    trouble.over.set()
    trouble.over = threading.Event()


@contextmanager
def serving(store: DirectoryStore, **settings: Any) -> Iterator[Served]:
    """A service over a store that may hold troubled models."""
    with serve(store=str(store.root), trust=TRUST, **({"poll_s": 0.05} | settings)) as served:
        yield served


def assert_answers_with(served: Served, version: int) -> None:
    """The service answers, and it is this version that does."""
    answer = served.predict(ROW)
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Model-Version"] == str(version)


# -- what is short ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["factory", "forward"])
@pytest.mark.parametrize("what", SHORTAGES)
def test_what_is_short_for_a_while_rejects_no_version(
    store: DirectoryStore, publish: Publish, where: str, what: str
) -> None:
    """The older version serves meanwhile, the retries are counted, and the version goes live when the shortage ends."""
    publish()
    publish(Troubled())
    setattr(trouble, where, SHORTAGES[what])
    with serving(store) as served:
        served.wait_until_live(1)
        wait_for(lambda: served.metric("emaswap_load_retries_total") >= 2, what="two retries")
        assert served.states()[2]["state"] != "rejected"
        assert "version 2 could not be loaded" in served.client.get("/model/versions").json()["status"]
        setattr(trouble, where, None)
        served.wait_until_live(2)
        assert not any("rejected" in state["state"] for state in served.states().values())


def test_an_operator_need_not_wait_for_the_next_retry(store: DirectoryStore, publish: Publish, tmp_path: Any) -> None:
    """A refresh tries again at once what failed for now."""
    (tmp_path / "token").write_text("correct horse")
    publish()
    publish(Troubled())
    trouble.factory = MemoryError()
    with serving(store, admin_token_file=tmp_path / "token", poll_s=3600) as served:
        wait_for(lambda: served.metric("emaswap_load_retries_total") >= 3, what="three retries")
        trouble.factory = None
        assert served.client.post("/model/refresh", headers=ADMIN).json()["live"] == 2


def test_a_factory_that_is_just_wrong_is_rejected(store: DirectoryStore, publish: Publish) -> None:
    """A file that a factory does not find is no shortage, and neither is any other error of its own."""
    publish()
    publish(Troubled())
    trouble.factory = FileNotFoundError(2, "No such file or directory", "vocabulary.txt")
    with serving(store) as served:
        assert served.wait_until_rejected(2)["reason"] == "factory_failed"
        served.wait_until_live(1)


class Giant(Linear):
    """A `Linear` that can be made larger than all memory."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.more = nn.Linear(width, width, bias=False)


def add_giant(store: DirectoryStore, term: Term, *, width: int, stored: int) -> None:
    """Commit a version whose factory makes a giant, with weights of another width, whose file is all holes."""
    good = store.manifest(store.newest())
    table = good.weights.tensors | {"more.weight": TensorInfo(dtype="float32", shape=(stored, stored))}
    blob = Blob(digest=digest_of(b"never read"), size=4 * stored**2 + good.weights.size)
    path = store.root / "weights" / f"{stem_of(blob.digest)}.safetensors"
    with path.open("wb") as file:
        file.truncate(blob.size)
    fields = {
        "weights": WeightsInfo(digest=blob.digest, size=blob.size, tensors=table),
        "architecture": Architecture.of(Giant, width=width),
    }

    def describe(place: Place) -> Manifest:
        return good.model_copy(
            update={**fields, "version": place.version, "term": place.term, "run": place.run, "parent": place.parent}
        )

    term.commit(describe)


def test_a_version_that_memory_does_not_suffice_for_is_retried_and_the_service_lives(
    store: DirectoryStore,
) -> None:
    """A weights file of 4 GB in a process that may use 1.5 GB more: not read, counted, and versions go on."""
    store.prepare()
    term = Term(store, "test")
    commit(store, term)
    with ServiceProcess(store.root, "--trust", HERE, "--poll-s", "0.05") as served:
        used = int(Path(f"/proc/{served.process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(served.process.pid, resource.RLIMIT_AS, (used + (3 << 29), resource.RLIM_INFINITY))
        add_giant(store, term, width=1 << 15, stored=1 << 15)
        wait_for(lambda: served.metric("emaswap_load_retries_total") >= 3, what="three retries")
        assert served.states()[2]["state"] != "rejected"
        assert_answers_with(served, 1)
        status = served.client.get("/model/versions").json()["status"]
        assert "version 2 could not be loaded" in status
        assert "a tensor file takes 4.0 GiB of memory" in status
        commit(store, term)
        served.wait_until_live(3)
        resident = Path(f"/proc/{served.process.pid}/status").read_text().partition("VmHWM:")[2].split()[0]
        assert int(resident) < 1 << 20  # KiB


# -- what cannot be read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["versions", "weights", "probes"])
def test_one_file_that_cannot_be_read_hides_no_other_version(
    store: DirectoryStore, publish: Publish, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """A service that starts while a file of the newest version is unreadable serves the one before, and then it."""
    publish()
    second = publish()
    stem = {"versions": "00000002", "weights": second.weights.digest, "probes": second.probe.digest}[folder]
    unreadable = [stem.replace(":", "-")]
    real = Directory.open

    def open_(self: Directory, key: str) -> BinaryIO:
        if any(key.startswith(f"{folder}/{name}") for name in unreadable):
            raise Unreadable(f"cannot read {key}: Permission denied")
        return real(self, key)

    monkeypatch.setattr(Directory, "open", open_)
    with serving(store) as served:
        served.wait_until_live(1)
        assert_answers_with(served, 1)
        assert served.client.get("/readyz").status_code == 200
        assert "Permission denied" in served.client.get("/model/versions").json()["status"]
        assert served.metric("emaswap_store_errors_total") == 0
        unreadable.clear()
        served.wait_until_live(2)


def test_a_variant_that_was_repaired_is_tried_again(store: DirectoryStore) -> None:
    """A service of a variant notices when the variant's own file has other bytes."""
    published(store)
    digest = store.manifest(1).variants["long"].weights.digest
    path = store.root / "weights" / f"{digest.replace(':', '-')}.safetensors"
    right = path.read_bytes()
    path.write_bytes(right[:-1] + b"\x01")
    with serving(store, variant="long") as served:
        assert served.wait_until_rejected(1)["reason"] == "digest_mismatch"
        path.write_bytes(right)
        served.wait_until_live(1)


# -- what hangs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["factory_hangs", "forward_hangs"])
def test_a_load_that_hangs_is_given_up(store: DirectoryStore, publish: Publish, where: str) -> None:
    """The older version serves, the status tells, later versions load, and what hung is tried once it has ended."""
    publish()
    publish(Troubled())
    setattr(trouble, where, True)
    with serving(store, load_timeout_s=0.3) as served:
        served.wait_until_live(1)
        status = served.client.get("/model/versions").json()["status"]
        assert "version 2 could not be loaded" in status
        assert "not done within 0.3 s" in status
        assert served.metric("emaswap_hung_loads") == 1
        assert served.states()[2]["state"] == "discovered"
        time.sleep(1)  # many looks
        assert served.metric("emaswap_load_retries_total") == 1
        setattr(trouble, where, False)
        trouble.over.set()
        served.wait_until_live(2)
        assert served.metric("emaswap_hung_loads") == 0


def test_the_watch_goes_on_beside_a_load_that_hangs(store: DirectoryStore, publish: Publish) -> None:
    """A version that is published after one whose load hangs goes live."""
    publish()
    with serving(store, load_timeout_s=0.3) as served:
        served.wait_until_live(1)
        module = Troubled()
        served.wait_until_live(publish(module).version)
        trouble.factory_hangs = True
        publish(module)
        wait_for(lambda: served.metric("emaswap_hung_loads") == 1, what="a load that hangs")
        later = publish(Untroubled())
        served.wait_until_live(later.version)
        assert_answers_with(served, later.version)
        assert served.metric("emaswap_hung_loads") == 1


def test_an_order_does_not_wait_for_a_load_that_hangs(store: DirectoryStore, publish: Publish, tmp_path: Path) -> None:
    """It is in the store, for all replicas, before the load is given up."""
    publish()
    (tmp_path / "token").write_text("correct horse")
    with (
        serving(store, load_timeout_s=20, admin_token_file=tmp_path / "token") as served,
        ThreadPoolExecutor(1) as pool,
    ):
        served.wait_until_live(1)
        module = Troubled()
        served.wait_until_live(publish(module).version)
        trouble.factory_hangs = True
        publish(module)
        wait_for(lambda: served.states().get(3, {}).get("state") == "verifying", what="a load that hangs")
        answer = pool.submit(served.client.post, "/model/pin", json={"version": 1}, headers=ADMIN)
        wait_for(store.orders.pin, timeout_s=5, what="the pin")
        trouble.over.set()
        assert answer.result().json()["pin"]["version"] == 1


def test_a_model_that_is_too_large_is_rejected(store: DirectoryStore, publish: Publish) -> None:
    """The limit is looked at before the weights are read, and the reason names both sizes."""
    size = publish().weights.size
    with serve(store=str(store.root), poll_s=0.05, max_model_bytes=size - 1) as served:
        assert served.wait_until_rejected(1)["reason"] == "too_large"
    with serve(store=str(store.root), poll_s=0.05, max_model_bytes=size) as served:
        served.wait_until_live(1)
