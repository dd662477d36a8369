"""Terms: one line of versions, whoever publishes, and a publisher that was overtaken stops."""

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import pytest

from emaswap import (
    Architecture,
    BadVersion,
    DirectoryStore,
    Fenced,
    Manifest,
    PublishError,
    Short,
    Signature,
    Store,
    StoreError,
    TensorField,
    Unreadable,
)
from emaswap.files.digest import digest_of
from emaswap.store.directory import Directory
from emaswap.store.files import read
from emaswap.store.keys import CURRENT, manifest_key
from emaswap.store.line import Line, Place, Term
from emaswap.store.retention import Retention
from emaswap.versions.manifest import MAX_MANIFEST_BYTES, ProbeInfo, TensorInfo, TrainingInfo, WeightsInfo

_ANY = digest_of(b"")
_FIELD = TensorField(name="x", shape=(1,))


def describe(place: Place) -> Manifest:
    """A manifest for a place, of a version whose files nobody reads here."""
    return Manifest(
        model="test",
        version=place.version,
        term=place.term,
        run=place.run,
        parent=place.parent,
        created_at=datetime.now(UTC),
        weights=WeightsInfo(digest=_ANY, size=0, tensors={"w": TensorInfo(dtype="float32", shape=(1,))}),
        architecture=Architecture(factory="tests.models:Linear"),
        signature=Signature(inputs=(_FIELD,), outputs=(_FIELD,)),
        probe=ProbeInfo(digest=_ANY, size=0, rtol=1e-4, atol=1e-5),
    )


def opened(store: DirectoryStore) -> Term:
    """The next publisher's turn."""
    return Term(store, "test")


def commits(term: Term, count: int) -> list[int]:
    """The numbers that a publisher gets for its next versions."""
    return [term.commit(describe).version for _ in range(count)]


def stored(store: DirectoryStore, version: int) -> bytes:
    """A manifest's bytes as they lie in the store."""
    return read(store.files, manifest_key(version), MAX_MANIFEST_BYTES)


def assert_one_line(store: DirectoryStore) -> None:
    """Numbers without gaps, terms that never go down, one run for each term, and every version names the one before."""
    versions = store.versions()
    assert versions == list(range(1, len(versions) + 1))
    manifests = [store.manifest(version) for version in versions]
    assert all(older.term <= newer.term for older, newer in pairwise(manifests))
    runs = {(manifest.term, manifest.run) for manifest in manifests}
    assert len(runs) == len({term for term, _ in runs})
    parents = [manifest.parent for manifest in manifests]
    assert parents == [None, *(digest_of(stored(store, version)) for version in versions[:-1])]


class Hintless(Directory):
    """A directory in which CURRENT can be neither read nor written."""

    def open(self, key: str) -> BinaryIO:
        if key == CURRENT:
            raise Short(f"cannot read {key}: Too many open files")
        return super().open(key)

    def replace(self, key: str, data: bytes) -> None:
        raise StoreError(f"cannot write {key}: Input/output error")


def test_current_is_only_a_hint_for_publishers(store: DirectoryStore) -> None:
    """Whatever is wrong with CURRENT, a version that was committed is no failure, and the next one follows."""
    term = opened(store)
    term.store = Store(Hintless(store.root))
    assert commits(term, 2) == [1, 2]
    assert store.versions() == [1, 2]


@pytest.mark.parametrize("kind", ["folder", "full folder", "link", "dangling link", "fifo"])
@pytest.mark.timeout(20)
def test_a_current_that_is_no_file_stops_no_publisher(store: DirectoryStore, kind: str) -> None:
    """Publishers start and commit beside it, and set it right where nothing of anybody's would go with it."""
    path = store.root / CURRENT
    if kind.endswith("folder"):
        path.mkdir()
        (path / "notes.txt").touch() if kind == "full folder" else None
    elif kind.endswith("link"):
        path.symlink_to("/nowhere" if kind == "dangling link" else store.root / "versions")
    else:
        os.mkfifo(path)
    assert commits(opened(store), 2) == [1, 2]
    assert commits(opened(store), 1) == [3]
    assert store.versions() == [1, 2, 3]
    assert store.hint() == (0 if kind == "full folder" else 3)


def test_a_manifest_that_no_reader_takes_is_not_committed(store: DirectoryStore) -> None:
    """A version whose manifest is too large is an error of the publisher's, and its number stays free."""
    term = opened(store)
    crowded = {f"a metric named {number:060d}": 0.5 for number in range(60_000)}

    def describe_much(place: Place) -> Manifest:
        return describe(place).model_copy(update={"training": TrainingInfo(metrics=crowded)})

    with pytest.raises(PublishError, match="publish fewer tensors, variants, metrics or arguments"):
        term.commit(describe_much)
    assert store.versions() == []
    assert commits(term, 1) == [1]


# -- one after another ---------------------------------------------------------------------------------------------


def test_numbers_go_on_from_one_publisher_to_the_next(store: DirectoryStore) -> None:
    """The first version is 1, and a later publisher goes on where the one before it ended."""
    assert commits(opened(store), 3) == [1, 2, 3]
    assert commits(opened(store), 2) == [4, 5]
    assert store.newest() == store.hint() == 5


def test_each_publisher_takes_the_next_term(store: DirectoryStore) -> None:
    """Terms grow by one from publisher to publisher and stay what they are from version to version."""
    for _ in range(3):
        commits(opened(store), 2)
    assert [store.manifest(version).term for version in store.versions()] == [1, 1, 2, 2, 3, 3]


def test_each_version_names_the_one_before_it(store: DirectoryStore) -> None:
    """A version's parent is the digest of the previous manifest's bytes, also over a change of publishers."""
    commits(opened(store), 2)
    commits(opened(store), 2)
    assert_one_line(store)


def test_a_parent_is_the_digest_of_bytes_that_a_later_release_wrote(store: DirectoryStore) -> None:
    """Fields and spacing that this release would not write itself belong to the bytes that the next version names."""
    manifest = json.loads(describe(Place(1, 1, "a later release's", None)).encode())
    data = json.dumps(manifest | {"field_of_a_later_release": 1}).encode()
    store.files.create(manifest_key(1), data)
    assert opened(store).commit(describe).parent == digest_of(data)


def test_a_parent_is_the_digest_of_the_bytes_of_a_zombie_that_was_passed_over(store: DirectoryStore) -> None:
    """The bytes of a version that got in between are named as they are, not as this release would write them."""
    commits(opened(store), 1)
    term = opened(store)
    manifest = json.loads(describe(Place(2, 1, "a zombie's", None)).encode())
    data = json.dumps(manifest | {"field_of_a_later_release": 1}).encode()
    store.files.create(manifest_key(2), data)
    assert term.commit(describe).parent == digest_of(data)


def test_opening_a_term_commits_nothing(store: DirectoryStore) -> None:
    """A publisher that is opened and never publishes leaves no trace in the line."""
    opened(store)
    assert store.versions() == []
    assert commits(opened(store), 1) == [1]


def test_another_models_store_is_refused(store: DirectoryStore) -> None:
    """A store is for one model: the error names both, and nothing is written."""
    commits(opened(store), 1)
    with pytest.raises(PublishError, match="'test', not of 'other'"):
        Term(store, "other")
    assert store.versions() == [1]


@pytest.mark.parametrize(
    "hint",
    [None, b"rubbish", b'{"version": 1}', b'{"version": 99}'],
    ids=["missing", "rubbish", "behind", "ahead"],
)
def test_current_is_set_right_when_a_publisher_opens(store: DirectoryStore, hint: bytes | None) -> None:
    """A CURRENT that a killed publisher left wrong is repaired by the next, before it publishes."""
    commits(opened(store), 3)
    path = store.root / CURRENT
    path.unlink()
    if hint is not None:
        path.write_bytes(hint)
    opened(store)
    assert store.hint() == 3


# -- two at once ---------------------------------------------------------------------------------------------------


def test_the_older_of_two_publishers_stops(store: DirectoryStore) -> None:
    """A publisher that another has overtaken is fenced at its next commit, which does not show in the store."""
    older = opened(store)
    commits(older, 2)
    newer = opened(store)
    commits(newer, 1)
    with pytest.raises(Fenced):
        older.commit(describe)
    assert store.versions() == [1, 2, 3]
    assert commits(newer, 1) == [4]


def test_a_fenced_publisher_is_told_what_happened(store: DirectoryStore) -> None:
    """The message names both runs with their terms, the version, the place, and what to do."""
    older = opened(store)
    commits(older, 1)
    newer = opened(store)
    commits(newer, 1)
    with pytest.raises(Fenced) as caught:
        older.commit(describe)
    message = str(caught.value)
    for part in (f"{newer.run} (term 2)", f"{older.run} (term 1)", "version 2", store.location, "stop this one"):
        assert part in message


def test_of_two_publishers_with_the_same_term_the_loser_stops(store: DirectoryStore) -> None:
    """When two start at once, the first to commit goes on and the other is fenced."""
    winner, loser = opened(store), opened(store)
    assert winner.term == loser.term
    commits(winner, 1)
    with pytest.raises(Fenced):
        loser.commit(describe)
    assert commits(winner, 1) == [2]
    assert_one_line(store)


def test_a_zombie_that_wins_a_number_is_passed_over(store: DirectoryStore) -> None:
    """The newer publisher goes on behind versions that an older one got in between, and then the older one stops."""
    zombie = opened(store)
    commits(zombie, 1)
    newer = opened(store)
    assert commits(zombie, 2) == [2, 3]
    assert commits(newer, 1) == [4]
    with pytest.raises(Fenced):
        zombie.commit(describe)
    assert_one_line(store)


@pytest.mark.parametrize("successors", [1, 3], ids=["one successor", "several successors"])
def test_a_zombie_is_fenced_although_the_versions_after_its_own_are_pruned(
    store: DirectoryStore, successors: int
) -> None:
    """Retention never makes room for a zombie: what it would collide with stays."""
    zombie = opened(store)
    commits(zombie, 2)
    for _ in range(successors):
        commits(opened(store), 4)
    for path in (store.root / "versions").iterdir():
        os.utime(path, (0, 0))
    Retention(store, keep=1, grace_s=0).prune()
    left = store.versions()
    assert len(left) < 2 + 4 * successors
    with pytest.raises(Fenced):
        zombie.commit(describe)
    assert store.versions() == left


def test_a_publishers_own_commit_is_no_reason_to_stop(store: DirectoryStore) -> None:
    """A commit that went through although it was reported as an error is passed over, not taken for another's."""
    term = opened(store)
    lost = describe(Place(1, term.term, term.run, None))
    store.files.create(manifest_key(1), lost.encode())
    assert commits(term, 2) == [2, 3]
    assert_one_line(store)


def test_a_commit_that_finds_its_own_bytes_has_succeeded(store: DirectoryStore) -> None:
    """A manifest that is there already with the very bytes to commit is committed under its own number."""
    term = opened(store)

    def describe_and_create(place: Place) -> Manifest:
        manifest = describe(place)
        store.files.create(manifest_key(place.version), manifest.encode())
        return manifest

    assert term.commit(describe_and_create).version == 1
    assert store.versions() == [1]


# -- what cannot be read -------------------------------------------------------------------------------------------


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


_DAMAGES: list[Callable[[Path], object]] = [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"rubbish"),
    lambda path: path.write_bytes(path.read_bytes()[:-20]),
    lambda path: path.write_bytes(b'{"format": 99}'),
    _link,
    _folder,
]


@pytest.mark.parametrize("damage", _DAMAGES, ids=["empty", "rubbish", "cut short", "later format", "link", "folder"])
def test_an_unreadable_newest_manifest_does_not_stop_the_next_publisher(
    store: DirectoryStore, damage: Callable[[Path], object]
) -> None:
    """The line goes on behind a manifest that cannot be read, which nobody can name as a parent."""
    commits(opened(store), 3)
    damage(store.root / manifest_key(3))
    with pytest.raises(BadVersion):
        store.manifest(3)
    manifest = opened(store).commit(describe)
    assert manifest.version == 4
    assert manifest.parent is None


@pytest.mark.parametrize("damaged", [(4,), (3, 4), (2, 3, 4), (1, 2, 3, 4)], ids=["one", "two", "three", "all"])
def test_a_term_is_above_any_that_an_unreadable_manifest_hides(store: DirectoryStore, damaged: tuple[int, ...]) -> None:
    """A publisher whose manifests were damaged is a zombie to the next one all the same."""
    for _ in range(3):
        commits(opened(store), 1)
    zombie = opened(store)
    commits(zombie, 1)
    for version in damaged:
        (store.root / manifest_key(version)).write_bytes(b"rubbish")
    term = opened(store)
    assert term.term > zombie.term
    assert commits(term, 1) == [5]
    with pytest.raises(Fenced):
        zombie.commit(describe)


def test_an_unreadable_manifest_in_the_way_is_passed_over(store: DirectoryStore) -> None:
    """A publisher goes on behind something that took its number and is no manifest."""
    term = opened(store)
    commits(term, 1)
    (store.root / manifest_key(2)).write_bytes(b"rubbish")
    manifest = term.commit(describe)
    assert manifest.version == 3
    assert manifest.parent is None


# -- many at once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("publishers", [2, 6])
def test_of_publishers_that_all_go_on_exactly_one_survives(store: DirectoryStore, publishers: int) -> None:
    """However publishers interleave, of those that go on all but one are fenced, and the versions are one line."""
    terms = []
    for index in range(publishers):
        terms.append(opened(store))
        if index % 2:
            commits(terms[-1], 1)  # so that some share a term and some do not
    barrier = threading.Barrier(publishers)
    fenced: list[str] = []

    def go_on(term: Term) -> list[int]:
        got: list[int] = []
        barrier.wait(30)
        try:
            while len(fenced) < publishers - 1 or not got:
                got.append(term.commit(describe).version)
        except Fenced:
            fenced.append(term.run)
        return got

    with ThreadPoolExecutor(publishers) as pool:
        got = list(pool.map(go_on, terms))
    assert len(fenced) == publishers - 1
    assert_one_line(store)
    for term, versions in zip(terms, got, strict=True):
        assert all(store.manifest(version).run == term.run for version in versions)
    assert store.manifest(store.newest()).run not in fenced


def test_publishers_that_come_and_go_make_one_line(store: DirectoryStore) -> None:
    """Publishers that open, are overtaken and start again, all at the same time, never break the line."""

    def come_and_go(count: int) -> list[int]:
        got: list[int] = []
        for _ in range(5):
            term = opened(store)
            try:
                for _ in range(count):
                    got.append(term.commit(describe).version)
            except Fenced:
                continue
        return got

    with ThreadPoolExecutor(5) as pool:
        got = [version for versions in pool.map(come_and_go, [1, 2, 3, 4, 5]) for version in versions]
    assert sorted(got) == store.versions()
    assert_one_line(store)


class _Reluctant(Directory):
    """A directory in which one file may not be read for a while."""

    withheld: str | None = None

    def open(self, key: str) -> BinaryIO:
        if key == self.withheld:
            raise Unreadable(f"{key} may not be read")
        return super().open(key)


def test_a_term_that_could_not_be_read_is_read_later(tmp_path: Path) -> None:
    """A reader that could not tell at first that a publisher had been replaced can tell once the manifest is readable."""
    files = _Reluctant(tmp_path / "store")
    store = Store(files)
    zombie = Term(store, "test")
    first = zombie.commit(describe)
    Term(store, "test").commit(describe)
    stale = first.model_copy(update={"version": 3})
    assert store.commit(3, stale.encode())
    line = Line(store)
    files.withheld = manifest_key(2)
    line.check(store.manifest(3), store.seen())
    files.withheld = None
    with pytest.raises(BadVersion, match="stale_term"):
        line.check(store.manifest(3), store.seen())
