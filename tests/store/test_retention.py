"""Retention: what must stay stays, what nobody needs goes, and what is not recognised is never touched."""

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from emaswap import DirectoryStore, EmaswapError, Manifest, Missing, Publisher, Store, StoreError
from emaswap.files.tensor_file import Blob
from emaswap.store.directory import Directory
from emaswap.store.keys import manifest_key, tensors_key
from emaswap.store.retention import Retention
from tests.models import Linear

HOUR_S = 3600.0


def turn(store: DirectoryStore, *modules: nn.Module) -> list[Manifest]:
    """One publisher's versions, of these modules."""
    manifests: list[Manifest] = []
    publisher = Publisher(
        store,
        name="test",
        architecture="tests.models:Linear",
        probe=torch.ones(1, 3),
        keep=1000,
        on_publish=manifests.append,
    )
    with publisher:
        for module in modules:
            publisher.publish(module)
            publisher.flush()
    return manifests


def fresh(count: int) -> list[nn.Module]:
    """Modules with weights that no other has."""
    return [Linear() for _ in range(count)]


def make_old(store: DirectoryStore, *folders: str, seconds: float = 2 * HOUR_S) -> None:
    """Age every file of some folders, by default all."""
    then = time.time() - seconds
    for folder in folders or ("versions", "weights", "probes"):
        for path in (store.root / folder).iterdir():
            os.utime(path, (then, then), follow_symlinks=False)


def whole(store: DirectoryStore) -> list[int]:
    """The versions whose manifest, weights and probe are all there."""
    return [version for version in store.versions() if None not in store.stamps(version).values()]


def weights_file(store: DirectoryStore, manifest: Manifest) -> Path:
    """Where a version's weights lie."""
    return store.root / tensors_key("weights", manifest.weights.digest)


@pytest.mark.parametrize(
    ("keep", "left"),
    [(1, [6]), (2, [5, 6]), (5, [2, 3, 4, 5, 6]), (6, [1, 2, 3, 4, 5, 6]), (100, [1, 2, 3, 4, 5, 6])],
    ids=["one", "two", "all but the first", "all", "more than there are"],
)
def test_the_newest_versions_are_kept(store: DirectoryStore, keep: int, left: list[int]) -> None:
    """Of old versions just the newest stay whole, as many as are to be kept."""
    turn(store, *fresh(6))
    make_old(store)
    pruned = Retention(store, keep=keep).prune()
    assert whole(store) == left
    assert pruned == [version for version in range(1, 7) if version not in left]


def test_pruning_takes_all_files_of_a_version(store: DirectoryStore) -> None:
    """A pruned version's weights and probe go with its manifest."""
    turn(store, *fresh(5))
    make_old(store)
    Retention(store, keep=2).prune()
    assert len(store.files.entries("weights")) == len(store.files.entries("probes")) == 2
    with pytest.raises(Missing):
        store.manifest(2)


def test_pruning_again_does_nothing(store: DirectoryStore) -> None:
    """What is pruned already is not pruned once more, nor reported."""
    turn(store, *fresh(4))
    make_old(store)
    retention = Retention(store, keep=1)
    assert retention.prune() == [1, 2, 3]
    assert retention.prune() == []
    assert Retention(store, keep=1).prune() == []


def test_pruning_an_empty_store_does_nothing(store: DirectoryStore) -> None:
    """A store without versions has nothing to prune or to clean."""
    assert Retention(store).prune() == []
    assert Retention(store).clean() == []


def test_keeping_nothing_is_refused(store: DirectoryStore) -> None:
    """A store that keeps no version at all would have none to serve."""
    with pytest.raises(EmaswapError, match="keep=0"):
        Retention(store, keep=0)


@pytest.mark.parametrize("pinned", [1, 3, 6])
def test_the_pinned_version_is_kept(store: DirectoryStore, pinned: int) -> None:
    """A version that an operator pinned stays whole, however old."""
    turn(store, *fresh(6))
    make_old(store)
    store.orders.set_pin(pinned)
    Retention(store, keep=1).prune()
    assert whole(store) == sorted({pinned, 6})


def test_a_version_goes_once_it_is_no_longer_pinned(store: DirectoryStore) -> None:
    """A pin keeps a version as long as it is set, not for ever."""
    turn(store, *fresh(4))
    make_old(store)
    retention = Retention(store, keep=1)
    store.orders.set_pin(2)
    retention.prune()
    store.orders.clear_pin()
    assert retention.prune() == [2]


def test_a_pin_that_cannot_be_understood_keeps_everything(store: DirectoryStore) -> None:
    """As long as nobody can tell what is pinned, nothing is deleted."""
    turn(store, *fresh(4))
    make_old(store)
    (store.root / "PIN").write_text("rubbish")
    with pytest.raises(EmaswapError, match="PIN"):
        Retention(store, keep=1).prune()
    assert whole(store) == [1, 2, 3, 4]


def test_what_cannot_be_understood_takes_no_place_of_what_is_kept(store: DirectoryStore) -> None:
    """However many newer manifests are rubbish, the newest good versions stay."""
    turn(store, *fresh(3))
    for version in (4, 5):
        assert store.files.create(manifest_key(version), b"")
    make_old(store)
    Retention(store, keep=1).prune()
    assert 3 in whole(store)


def test_young_versions_are_kept(store: DirectoryStore) -> None:
    """A version that a reader may just have found is not deleted, even if newer ones fill the number to keep."""
    turn(store, *fresh(3))
    make_old(store, seconds=61)
    turn(store, *fresh(3))
    Retention(store, keep=1, grace_s=60).prune()
    assert whole(store) == [4, 5, 6]


def test_files_that_were_just_written_are_kept(store: DirectoryStore) -> None:
    """A publisher may be about to commit another version with the weights of one that falls out."""
    old, _ = turn(store, *fresh(2))
    make_old(store)
    state = store.tensors("weights", old.weights).tensors
    assert store.add_tensors("weights", state) == Blob(digest=old.weights.digest, size=old.weights.size)
    Retention(store, keep=1).prune()
    assert weights_file(store, old).exists()


def test_the_first_manifest_of_each_term_stays(store: DirectoryStore) -> None:
    """Its weights go, but the manifest that a zombie of the term before would collide with is there for good."""
    for _ in range(3):
        turn(store, *fresh(3))
    make_old(store)
    Retention(store, keep=1).prune()
    assert store.versions() == [1, 4, 7, 9]
    assert whole(store) == [9]


@pytest.mark.parametrize("keeper", ["newest", "pinned", "young"])
def test_weights_that_a_kept_version_names_stay(store: DirectoryStore, keeper: str) -> None:
    """Identical content is one file: it is not deleted with one version while another that is kept names it."""
    same = Linear()
    if keeper == "pinned":
        kept, *_ = turn(store, same, *fresh(1), same, *fresh(2))
        store.orders.set_pin(1)
        make_old(store)
    else:
        *_, kept = turn(store, *fresh(1), same, *fresh(1), same)
        make_old(store)
        if keeper == "young":
            kept = turn(store, same, *fresh(2))[0]
    Retention(store, keep=1).prune()
    assert len(store.versions()) < kept.version + 2
    assert kept.version in whole(store)
    store.tensors("weights", kept.weights)


def test_weights_go_with_the_last_version_that_names_them(store: DirectoryStore) -> None:
    """Once no version names a file of shared content any more, it is deleted."""
    same = Linear()
    manifest, *_ = turn(store, same, *fresh(1), same, *fresh(1))
    make_old(store)
    Retention(store, keep=1).prune()
    assert not weights_file(store, manifest).exists()


@pytest.mark.parametrize(
    "name",
    [
        "README",
        "notes/old.txt",
        "versions/notes.txt",
        "versions/42.json",
        "versions/00000002.json.orig",
        "weights/notes.txt",
        "weights/backup.safetensors",
        "weights/md5-0123456789abcdef.safetensors",
        "probes/blake3-0123.safetensors.orig",
        "tmp/notes.txt",
    ],
)
def test_what_is_not_recognised_is_never_deleted(store: DirectoryStore, name: str) -> None:
    """Somebody else's file in a store stays, however old, whatever is pruned and cleaned around it."""
    turn(store, *fresh(4))
    path = store.root / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    make_old(store, "versions", "weights", "probes", "tmp", seconds=1000 * HOUR_S)
    retention = Retention(store, keep=1)
    assert retention.prune() == [1, 2, 3]
    retention.clean()
    store.prepare()
    assert path.read_text() == "mine"


@pytest.mark.parametrize("kind", ["weights", "probes"])
def test_old_orphans_are_cleaned(store: DirectoryStore, kind: str) -> None:
    """Tensor files whose publisher was killed before its commit go after an hour, and no others do."""
    turn(store, *fresh(2))
    named = store.files.entries(kind).keys()
    store.add_tensors("weights" if kind == "weights" else "probes", {"a": torch.randn(4)}, "blake3")
    (orphan,) = store.files.entries(kind).keys() - named
    assert Retention(store).clean() == []
    make_old(store, "weights", "probes")
    assert Retention(store).clean() == [f"{kind}/{orphan}"]
    assert store.files.entries(kind).keys() == named
    assert whole(store) == [1, 2]


def test_a_publisher_cleans_orphans_when_it_starts(store: DirectoryStore) -> None:
    """What a killed publisher left is gone once the next one has started."""
    store.add_tensors("weights", {"a": torch.randn(4)}, "sha256")
    make_old(store, "weights")
    turn(store)
    assert store.files.entries("weights") == {}


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.write_text("rubbish"), lambda path: path.write_text('{"format": 99}'), _link],
    ids=["rubbish", "later format", "link"],
)
def test_a_manifest_that_cannot_be_read_is_not_deleted(store: DirectoryStore, damage: Callable[[Path], object]) -> None:
    """A version of a later release, or a damaged one, stays for somebody who can tell what it is."""
    turn(store, *fresh(5))
    damage(store.root / manifest_key(3))
    make_old(store)
    Retention(store, keep=1).prune()
    assert store.versions() == [1, 3, 5]


def test_no_orphan_is_cleaned_beside_a_manifest_that_cannot_be_read(store: DirectoryStore) -> None:
    """A manifest that cannot be read may name any tensor file, so all of them stay."""
    turn(store, *fresh(3))
    (store.root / manifest_key(3)).write_text("rubbish")
    make_old(store, "versions", "weights", "probes")
    assert Retention(store).clean() == []
    assert len(store.files.entries("weights")) == 3


class Stubborn(Directory):
    """A directory in which some files cannot be deleted."""

    kept: tuple[str, ...] = ()

    def delete(self, key: str) -> None:
        if key in self.kept:
            raise StoreError(f"cannot delete {key}: Input/output error")
        super().delete(key)


@pytest.mark.parametrize("kind", ["manifest", "weights"])
def test_one_file_that_cannot_be_deleted_keeps_no_other_version(store: DirectoryStore, kind: str) -> None:
    """The others go all the same, the error is told at the end, and what a manifest names stays as long as it does."""
    manifests = turn(store, *fresh(6))
    make_old(store)
    files = Stubborn(store.root)
    weights = weights_file(store, manifests[2])
    files.kept = (manifest_key(3) if kind == "manifest" else str(weights.relative_to(store.root)),)
    with pytest.raises(StoreError, match="Input/output error"):
        Retention(Store(files), keep=2).prune()
    assert weights.exists()
    assert whole(store) == ([3, 5, 6] if kind == "manifest" else [5, 6])


def test_an_empty_folder_in_the_place_of_weights_does_not_stop_pruning(store: DirectoryStore) -> None:
    """It goes like the file that should be there."""
    manifests = turn(store, *fresh(4))
    make_old(store)
    weights_file(store, manifests[1]).unlink()
    weights_file(store, manifests[1]).mkdir()
    Retention(store, keep=1).prune()
    assert whole(store) == [4]


def test_what_was_remembered_of_a_deleted_store_is_forgotten(store: DirectoryStore) -> None:
    """Versions of the same numbers in a store that was made anew are judged by what they say themselves."""
    retention = Retention(store, keep=1)
    turn(store, *fresh(4))
    make_old(store)
    retention.prune()
    shutil.rmtree(store.root)
    again = turn(store, *fresh(4))
    make_old(store)
    retention.prune()
    assert whole(store) == [4]
    assert [weights_file(store, each).exists() for each in again] == [False, False, False, True]


def test_a_publisher_prunes_as_it_goes(store: DirectoryStore) -> None:
    """With each version that is published, an older one goes."""
    publisher = Publisher(
        store, name="test", architecture="tests.models:Linear", probe=torch.ones(1, 3), keep=2, grace_s=0
    )
    with publisher:
        for module in fresh(5):
            publisher.publish(module)
            publisher.flush()
            make_old(store)
    assert whole(store)[-2:] == [4, 5]
    assert len(store.files.entries("weights")) <= 3


def test_publishing_goes_on_when_pruning_fails(store: DirectoryStore, caplog: pytest.LogCaptureFixture) -> None:
    """A store that cannot be pruned is worth a warning, and no reason not to publish."""
    (store.root / "PIN").write_text("rubbish")
    with caplog.at_level(logging.WARNING):
        publisher = Publisher(
            store, name="test", architecture="tests.models:Linear", probe=torch.ones(1, 3), keep=1, grace_s=0
        )
        with publisher:
            for module in fresh(3):
                publisher.publish(module)
                publisher.flush()
    assert store.versions() == [1, 2, 3]
    assert "not pruned" in caplog.text
