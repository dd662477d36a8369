"""A store in a directory: whole files or none, one winner for each number, and nothing that is not a file is read."""

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from emaswap import (
    BadVersion,
    DirectoryStore,
    EmaswapError,
    Missing,
    NotAFile,
    ReadOnly,
    Reason,
    Store,
    StoreError,
    TooLarge,
    open_store,
)
from emaswap.store.directory import Directory
from emaswap.store.files import Entry, read
from emaswap.store.keys import CURRENT, PIN, manifest_key
from tests.conftest import Publish
from tests.disk import fill, small_disk
from tests.programs import run
from tests.serving import wait_for

HOUR_S = 3600.0


def age(path: Path, seconds: float) -> None:
    """Make a file look this much older than now."""
    then = datetime.now(UTC).timestamp() - seconds
    os.utime(path, (then, then), follow_symlinks=False)


def commit(store: DirectoryStore, *versions: int) -> None:
    """Take numbers in the line, with manifests that nobody reads here."""
    for version in versions:
        assert store.files.create(manifest_key(version), b"{}")


def leftovers(store: DirectoryStore) -> list[str]:
    """What lies in the store's folder of unfinished files."""
    return sorted(path.name for path in (store.root / "tmp").iterdir())


# -- opening -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "file://"], ids=["path", "file-url"])
def test_a_location_opens_the_directory_it_names(tmp_path: Path, prefix: str) -> None:
    """A path and a file:// URL of it open the same directory."""
    opened = open_store(f"{prefix}{tmp_path}/models")
    assert isinstance(opened, DirectoryStore)
    assert opened.root == tmp_path / "models"


def test_opening_touches_nothing(tmp_path: Path) -> None:
    """A reader may open a store before there is one and ask where to watch it, and that does not make it."""
    opened = open_store(tmp_path / "models")
    assert opened.watch_path == tmp_path / "models"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("location", ["gs://bucket/models", "https://example.org/models", "nfs://host/models"])
def test_a_location_of_an_unknown_scheme_is_refused_by_its_name(location: str) -> None:
    """A URL that this release cannot open raises an error with the URL in it, not one about a strange directory."""
    with pytest.raises(EmaswapError, match=location):
        open_store(location)


def test_preparing_makes_all_folders_and_their_parents(tmp_path: Path) -> None:
    """A publisher may name a directory that is not there, and preparing it twice is no error."""
    store = DirectoryStore(tmp_path / "deep" / "models")
    store.prepare()
    store.prepare()
    assert {path.name for path in store.root.iterdir()} == {"versions", "weights", "probes", "tmp"}


def test_a_store_that_is_not_there_is_missing_rather_than_empty(tmp_path: Path) -> None:
    """A reader can tell a store that was never made, or is not mounted, from one without versions."""
    with pytest.raises(Missing, match="does not exist"):
        DirectoryStore(tmp_path / "nowhere").versions()


# -- versions ------------------------------------------------------------------------------------------------------


def test_an_empty_store_has_no_versions(store: DirectoryStore) -> None:
    """Before the first commit there is no version, and the newest is 0."""
    assert store.versions() == []
    assert store.newest() == 0


def test_versions_are_listed_in_the_order_of_their_numbers(store: DirectoryStore) -> None:
    """Numbers ascend whatever their width and the order they were committed in, and gaps are no matter."""
    commit(store, 7, 123_456_789, 1, 100_000_000)
    assert store.versions() == [1, 7, 100_000_000, 123_456_789]
    assert store.newest() == 123_456_789


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "00000009.json.part",
        "00000009.sig",
        ".00000009.json",
        "9.json",
        "-0000009.json",
        "0000000x.json",
        "00000009.JSON",
        "1234567890123456.json",
    ],
)
def test_a_strange_name_among_the_manifests_is_no_version(store: DirectoryStore, name: str) -> None:
    """Only the names that publishers give count as versions."""
    commit(store, 1)
    (store.root / "versions" / name).write_bytes(b"{}")
    assert store.versions() == [1]


@pytest.mark.parametrize(
    "hint",
    [
        None,
        b"",
        b"rubbish",
        b"[]",
        b"{}",
        b'{"version": -1}',
        b'{"version": "soon"}',
        b'{"version": 10000000000000000000000}',
        b'{"version": 99}',
        b'{"version": 1}',
        b'{"version": 3}',
        b'{"version": 3, "since": "a later release"}',
        b" " * 100_000,
    ],
    ids=[
        "missing", "empty", "rubbish", "a list", "no number", "negative", "a word", "enormous", "a lie", "behind",
        "right", "with more fields", "too large",
    ],
)  # fmt: skip
def test_current_is_a_hint_and_never_the_truth(store: DirectoryStore, hint: bytes | None) -> None:
    """Whatever CURRENT says, the versions are the ones that were committed."""
    commit(store, 1, 2, 3)
    if hint is not None:
        (store.root / CURRENT).write_bytes(hint)
    assert store.versions() == [1, 2, 3]


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_a_current_that_is_no_file_says_nothing(store: DirectoryStore, kind: str) -> None:
    """A CURRENT that is not a regular file is as good as none."""
    commit(store, 1)
    put(kind, store.root / CURRENT)
    assert store.hint() == 0
    assert store.versions() == [1]


def test_a_version_shows_although_current_and_the_listing_lag_behind(store: DirectoryStore) -> None:
    """A look at the number after the newest listed one finds a commit whose publisher died before CURRENT."""
    commit(store, 1, 2)
    store.point_to(1)
    listed = store.files.entries("versions")
    lagging = Store(Lagging(store.root, listed))
    commit(store, 3, 4)
    assert lagging.versions() == [1, 2, 3, 4]


def test_current_leads_beyond_a_gap_that_a_lagging_listing_has(store: DirectoryStore) -> None:
    """A reader whose listing is stale follows CURRENT to a commit that is further on than the next number."""
    commit(store, 1)
    lagging = Store(Lagging(store.root, store.files.entries("versions")))
    commit(store, 5, 6)
    store.point_to(5)
    assert lagging.newest() == 6


class Lagging(Directory):
    """A directory whose listing is stale, as a network file system's may be."""

    def __init__(self, root: Path, listed: dict[str, Entry]) -> None:
        super().__init__(root)
        self._listed = listed

    def entries(self, folder: str) -> dict[str, Entry]:
        return self._listed if folder == "versions" else super().entries(folder)


# -- reading -------------------------------------------------------------------------------------------------------


def put(kind: str, path: Path) -> None:
    """Put something that is not a regular file where one is expected."""
    if kind == "link":
        target = path.parent.parent / "elsewhere"
        target.write_bytes(b"somebody's secret")
        path.symlink_to(target)
    elif kind == "dangling link":
        path.symlink_to("/nowhere")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "fifo"])
@pytest.mark.parametrize("key", [CURRENT, "versions/00000001.json", "weights/sha256-0.safetensors"])
@pytest.mark.timeout(20)
def test_only_regular_files_are_read(store: DirectoryStore, key: str, kind: str) -> None:
    """A link, a folder or a FIFO in a file's place is refused at once: not followed, and not waited for."""
    put(kind, store.root / key)
    with pytest.raises(NotAFile, match=key):
        read(store.files, key, 100)


def test_a_folder_that_is_a_link_is_not_followed(store: DirectoryStore, tmp_path: Path) -> None:
    """Files below a linked folder are refused, so that nothing outside of the store is ever read."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "00000001.json").write_bytes(b"{}")
    (store.root / "versions").rmdir()
    (store.root / "versions").symlink_to(elsewhere)
    with pytest.raises(NotAFile, match=r"versions/00000001\.json"):
        read(store.files, "versions/00000001.json", 100)


def test_the_store_itself_may_be_a_link(store: DirectoryStore, tmp_path: Path) -> None:
    """Where the operator's path leads is the operator's business: links are refused inside the store only."""
    store.point_to(3)
    link = tmp_path / "link"
    link.symlink_to(store.root)
    assert DirectoryStore(link).hint() == 3


def test_a_file_that_is_not_there_is_missing(store: DirectoryStore) -> None:
    """Reading what was never written, or was pruned, raises Missing with the file's name."""
    with pytest.raises(Missing, match=r"versions/00000007\.json"):
        store.manifest(7)


def test_a_file_is_read_up_to_its_limit_and_not_beyond(store: DirectoryStore) -> None:
    """A file of just the limit is read whole, and one byte more is too large."""
    (store.root / "note").write_bytes(b"x" * 100)
    assert read(store.files, "note", 100) == b"x" * 100
    with pytest.raises(TooLarge, match="note"):
        read(store.files, "note", 99)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.write_bytes(b"rubbish"), Reason.MANIFEST_INVALID),
        (lambda path: path.unlink() or path.mkdir(), Reason.NOT_A_FILE),
        (lambda path: os.truncate(path, 17 << 20), Reason.MANIFEST_INVALID),
        (lambda path: path.rename(path.with_name("00000002.json")), Reason.MANIFEST_INVALID),
    ],
    ids=["rubbish", "folder", "too large", "filed under another number"],
)
def test_a_manifest_that_cannot_be_right_is_a_bad_version(
    store: DirectoryStore, publish: Publish, change: Callable[[Path], object], reason: Reason
) -> None:
    """A damaged manifest is a bad version with a reason, which is another thing than a store that cannot be read."""
    publish()
    change(store.root / manifest_key(1))
    with pytest.raises(BadVersion) as caught:
        store.manifest(store.newest())
    assert caught.value.reason == reason


def test_the_stamps_of_a_version_change_with_any_of_its_files(store: DirectoryStore, publish: Publish) -> None:
    """Equal stamps mean equal bytes; a file that is replaced, or goes, shows in the stamps of its version."""
    publish()
    before = store.stamps(1)
    assert len(before) == 3
    assert None not in before.values()
    for key in before:
        data = read(store.files, key, 1 << 20)
        store.files.replace(key, data)
        after = store.stamps(1)
        assert {name for name in before if before[name] != after[name]} == {key}
        before = after
    store.files.delete(next(key for key in before if key.startswith("probes/")))
    assert None in store.stamps(1).values()


# -- committing ----------------------------------------------------------------------------------------------------


def test_creating_what_another_has_created_fails(store: DirectoryStore) -> None:
    """The second to create a file learns that it lost, and the first one's bytes stay."""
    assert store.files.create(manifest_key(1), b"first")
    assert not store.files.create(manifest_key(1), b"second")
    assert not store.files.create(manifest_key(1), b"first and more")
    assert read(store.files, manifest_key(1), 100) == b"first"


def test_creating_again_with_the_same_bytes_succeeds(store: DirectoryStore) -> None:
    """Our own bytes under the name are our own success: an error over a network may have hidden it."""
    assert store.files.create(manifest_key(1), b"mine")
    assert store.files.create(manifest_key(1), b"mine")


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "fifo"])
@pytest.mark.timeout(20)
def test_what_is_no_file_takes_a_number_too(store: DirectoryStore, kind: str) -> None:
    """A number under which a link, a folder or a FIFO lies is taken, and what lies there is left alone."""
    put(kind, store.root / manifest_key(1))
    before = store.files.entry(manifest_key(1))
    assert not store.files.create(manifest_key(1), b"mine")
    after = store.files.entry(manifest_key(1))
    assert before is not None
    assert after is not None
    assert after.stamp == before.stamp


def test_of_many_threads_exactly_one_creates_a_file(store: DirectoryStore) -> None:
    """However many threads race for a number, one wins, and its bytes are the ones that are there."""
    racers = 8
    barrier = threading.Barrier(racers)

    def race(key: str, racer: int) -> bool:
        barrier.wait(30)
        return store.files.create(key, f"racer {racer}".encode())

    with ThreadPoolExecutor(racers) as pool:
        for version in range(1, 16):
            key = manifest_key(version)
            won = list(pool.map(race, [key] * racers, range(racers)))
            assert won.count(True) == 1
            assert read(store.files, key, 100) == f"racer {won.index(True)}".encode()
    assert leftovers(store) == []


_RACER = """
import sys, time
from pathlib import Path
from emaswap import DirectoryStore
from emaswap.store.directory import Directory
from emaswap.store.files import Entry, read
from emaswap.store.keys import manifest_key
store, name = DirectoryStore(Path(sys.argv[1])), sys.argv[2]
(store.root / f"ready-{name}").touch()
while not (store.root / "go").exists():
    time.sleep(0.001)
print(*[version for version in range(1, 101) if store.files.create(manifest_key(version), name.encode())])
"""


def test_of_several_processes_exactly_one_creates_a_file(store: DirectoryStore) -> None:
    """Processes that race for the same numbers win each of them once, and hold what they won."""
    names = ["ann", "bob", "eve"]
    with ThreadPoolExecutor(len(names)) as pool:
        racers = {name: pool.submit(run, "-c", _RACER, str(store.root), name, timeout=60) for name in names}
        wait_for(lambda: all((store.root / f"ready-{name}").exists() for name in names), what="all racers ready")
        (store.root / "go").touch()
        won = {name: [int(number) for number in racer.result().stdout.split()] for name, racer in racers.items()}
    assert sorted(number for numbers in won.values() for number in numbers) == list(range(1, 101))
    for name, numbers in won.items():
        assert all(read(store.files, manifest_key(number), 100) == name.encode() for number in numbers)


def test_a_reader_never_sees_a_part_of_a_replaced_file(store: DirectoryStore) -> None:
    """A file that is replaced again and again is at every instant wholly the old one or wholly the new one."""
    written = [bytes([letter]) * size for letter, size in ((65, 10), (66, 200_000), (67, 3_000))]
    store.files.replace(CURRENT, written[0])
    done = threading.Event()
    seen: set[bytes] = set()

    def look() -> None:
        while not done.is_set():
            seen.add(read(store.files, CURRENT, 1 << 20))

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(look)
        for turn in range(150):
            store.files.replace(CURRENT, written[turn % 3])
        done.set()
        reading.result()
    assert seen <= set(written)
    assert leftovers(store) == []


def test_deleting_what_is_not_there_is_no_error(store: DirectoryStore) -> None:
    """A file that somebody else has deleted already is deleted."""
    store.files.delete(manifest_key(1))


# -- tensor files --------------------------------------------------------------------------------------------------


def test_tensors_come_back_as_they_were_written(store: DirectoryStore) -> None:
    """A tensor file is found by its digest and verified against it."""
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4)}
    blob = store.add_tensors("weights", tensors, "blake3")
    read = store.tensors("weights", blob).tensors
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert leftovers(store) == []


def test_the_same_tensors_are_one_file(store: DirectoryStore) -> None:
    """Content that is there already is written to the same name."""
    blobs = {store.add_tensors("weights", {"a": torch.ones(3)}, "sha256") for _ in range(3)}
    assert len(blobs) == 1
    assert len(store.files.entries("weights")) == 1


def test_tensors_that_cannot_be_written_leave_nothing_behind(store: DirectoryStore) -> None:
    """A failure in the middle of writing leaves neither a tensor file nor an unfinished one."""
    with pytest.raises(EmaswapError, match="complex128"):
        store.add_tensors("weights", {"a": torch.ones(3, dtype=torch.complex128)}, "blake3")
    assert store.files.entries("weights") == {}
    assert leftovers(store) == []


# -- what is left of a killed publisher ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "age_s", "stays"),
    [
        ("0123456789abcdef0123456789abcdef.part", 2 * HOUR_S, False),
        ("0123456789abcdef0123456789abcdef.part", HOUR_S / 2, True),
        ("notes.txt", 1000 * HOUR_S, True),
    ],
    ids=["stale", "fresh", "not recognised"],
)
def test_preparing_clears_unfinished_files_that_are_old(
    store: DirectoryStore, name: str, age_s: float, *, stays: bool
) -> None:
    """What a killed publisher left goes after an hour; what may be in use, or is not recognised, stays."""
    path = store.root / "tmp" / name
    path.write_bytes(b"half")
    age(path, age_s)
    store.prepare()
    assert path.exists() == stays


def test_a_strange_folder_among_the_unfinished_files_does_not_stop_publishing(store: DirectoryStore) -> None:
    """An old folder whose name looks like that of an unfinished file is left alone, and the store can be prepared."""
    folder = store.root / "tmp" / "old.part"
    folder.mkdir()
    age(folder, 1000 * HOUR_S)
    store.prepare()
    assert folder.exists()


# -- a disk that is full, or read-only ------------------------------------------------------------------------------


@pytest.fixture
def cramped(tmp_path: Path) -> Iterator[DirectoryStore]:
    """A store on a file system with very little room."""
    with small_disk(tmp_path / "disk", "256k") as disk:
        store = DirectoryStore(disk)
        store.prepare()
        yield store


def test_a_full_disk_is_an_error_that_says_so(cramped: DirectoryStore) -> None:
    """Every way of writing fails with the store's own error, which names the problem and the place."""
    fill(cramped.root)
    problem = f"{cramped.location}: No space left on device"
    with pytest.raises(StoreError, match=problem):
        cramped.add_tensors("weights", {"a": torch.ones(10_000)}, "blake3")
    with pytest.raises(StoreError, match=problem):
        cramped.files.create(manifest_key(1), b"x" * 10_000)
    with pytest.raises(StoreError, match=problem):
        cramped.point_to(1)


def test_a_full_disk_leaves_nothing_half_written(cramped: DirectoryStore) -> None:
    """After a failed write what was there is still there, and nothing else."""
    commit(cramped, 1)
    cramped.point_to(1)
    fill(cramped.root)
    for write in (
        lambda: cramped.add_tensors("weights", {"a": torch.ones(10_000)}, "blake3"),
        lambda: cramped.files.create(manifest_key(2), b"x" * 10_000),
        lambda: cramped.point_to(2),
    ):
        with pytest.raises(StoreError):
            write()
    assert cramped.versions() == [1]
    assert cramped.hint() == 1
    assert cramped.files.entries("weights") == {}
    assert leftovers(cramped) == []


def test_a_store_works_again_once_there_is_space(cramped: DirectoryStore) -> None:
    """A disk that was full and has room again needs nothing else."""
    filler = fill(cramped.root)
    with pytest.raises(StoreError):
        cramped.files.create(manifest_key(1), b"{}")
    filler.unlink()
    blob = cramped.add_tensors("weights", {"a": torch.ones(10_000)}, "blake3")
    commit(cramped, 1)
    assert torch.equal(cramped.tensors("weights", blob).tensors["a"], torch.ones(10_000))
    assert cramped.versions() == [1]


def test_a_store_that_may_not_be_written_can_be_read(cramped: DirectoryStore) -> None:
    """On a file system mounted read-only, reading works and every way of writing raises ReadOnly."""
    commit(cramped, 1)
    cramped.orders.set_pin(1)
    subprocess.run(["mount", "-o", "remount,ro", str(cramped.root)], check=True)
    assert not cramped.is_writable()
    assert cramped.versions() == [1]
    assert cramped.orders.pin() is not None
    for write in (
        lambda: cramped.add_tensors("weights", {"a": torch.ones(1)}, "blake3"),
        lambda: cramped.files.create(manifest_key(2), b"{}"),
        lambda: cramped.point_to(1),
        lambda: cramped.files.delete(manifest_key(1)),
        lambda: cramped.orders.set_pin(1),
        cramped.orders.clear_pin,
    ):
        with pytest.raises(ReadOnly, match=cramped.location):
            write()


# -- the pin -------------------------------------------------------------------------------------------------------


def test_a_pin_is_kept_as_it_was_set(store: DirectoryStore) -> None:
    """A pin's version, reason and time are found by whoever opens the store."""
    commit(store, 1, 2)
    pin = store.orders.set_pin(1, "version 2 is worse on Sundays")
    assert (pin.version, pin.reason) == (1, "version 2 is worse on Sundays")
    assert DirectoryStore(store.root).orders.pin() == pin


def test_a_pin_is_replaced_by_the_next(store: DirectoryStore) -> None:
    """There is one pin at a time, the last that was set."""
    commit(store, 1, 2)
    for version in (1, 2):
        store.orders.set_pin(version)
    pin = store.orders.pin()
    assert pin is not None
    assert pin.version == 2


def test_a_cleared_pin_is_gone(store: DirectoryStore) -> None:
    """After clearing there is no pin, and clearing again is no error."""
    commit(store, 1)
    store.orders.set_pin(1)
    store.orders.clear_pin()
    store.orders.clear_pin()
    assert store.orders.pin() is None


@pytest.mark.parametrize(
    ("committed", "has"),
    [((), "no version yet"), ((3, 4, 5), "3 versions from 3 to 5")],
    ids=["empty store", "some versions"],
)
def test_only_versions_that_are_there_can_be_pinned(
    store: DirectoryStore, committed: tuple[int, ...], has: str
) -> None:
    """Pinning an unknown version is refused with what the store has, and leaves no pin."""
    commit(store, *committed)
    with pytest.raises(Missing, match=f"version 9 is not in .* it has {has}"):
        store.orders.set_pin(9)
    assert store.orders.pin() is None


@pytest.mark.parametrize(
    "rubbish",
    [
        b"",
        b"rubbish",
        b"{}",
        b'{"version": 0, "at": "2025-01-01T00:00:00Z"}',
        b'{"version": true, "at": "2025-01-01T00:00:00Z"}',
        b'{"version": "1", "at": "2025-01-01T00:00:00Z"}',
        b'{"version": 1.0, "at": "2025-01-01T00:00:00Z"}',
        b'{"version": 1, "at": "2025-01-01T00:00:00Z", "digest": "1"}',
        b'{"version": 1, "at": "yesterday"}',
        b"[" * 60_000,
        b" " * 100_000,
        b"\xff\xfe",
    ],
    ids=[
        "empty", "rubbish", "nothing in it", "version 0", "true", "a text", "a float", "no digest", "no time", "deep",
        "too large", "not UTF-8",
    ],
)  # fmt: skip
def test_a_pin_that_cannot_be_understood_is_an_error(store: DirectoryStore, rubbish: bytes) -> None:
    """Rubbish in PIN is neither a pin nor none: it raises, with the way out, and unpinning is one."""
    (store.root / PIN).write_bytes(rubbish)
    with pytest.raises(StoreError, match="pin again or unpin"):
        store.orders.pin()
    store.orders.clear_pin()
    assert store.orders.pin() is None


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "fifo"])
@pytest.mark.timeout(20)
def test_a_pin_that_is_no_file_is_an_error_and_can_be_repaired(store: DirectoryStore, kind: str) -> None:
    """Neither a pin nor none: it raises, with the way out, and both unpinning and pinning again are one."""
    commit(store, 1)
    put(kind, store.root / PIN)
    with pytest.raises(StoreError, match="pin again or unpin"):
        store.look()
    store.orders.clear_pin()
    assert store.look().pin is None
    put(kind, store.root / PIN) if kind != "link" else (store.root / PIN).symlink_to(store.root / CURRENT)
    assert store.orders.set_pin(1) == store.look().pin


def test_a_folder_that_holds_something_is_never_deleted(store: DirectoryStore) -> None:
    """What is in a file's place is removed as far as nothing of anybody's goes with it."""
    (store.root / PIN).mkdir()
    (store.root / PIN / "notes.txt").write_text("somebody's")
    with pytest.raises(StoreError, match="cannot delete PIN in .*: Directory not empty"):
        store.orders.clear_pin()
    with pytest.raises(StoreError):
        store.files.replace(PIN, b"{}")
    assert (store.root / PIN / "notes.txt").read_text() == "somebody's"


def test_versions_are_seen_whatever_became_of_the_pin(store: DirectoryStore) -> None:
    """Whoever asks for the versions alone is not troubled by an order that cannot be understood."""
    commit(store, 1, 2)
    (store.root / PIN).write_bytes(b"rubbish")
    assert store.seen().numbers == (1, 2)
