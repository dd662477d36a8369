"""Notices: changes of a directory are told at once, whatever happens to the directory itself."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import watchfiles

from service.control import notices
from service.control.notices import Notices
from tests.serving import wait_for


class Listener:
    """Notices of a directory that may not be there yet, and what they have told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told = threading.Event()
        self._notices = Notices(path)
        self._notices.start(self._told.set)

    def hears(self, timeout_s: float = 10.0) -> bool:
        """Whether something is told."""
        return self._told.wait(timeout_s)

    def hears_a_write(self) -> bool:
        """Whether the writing of a file is told, once all that was before it has been."""
        for attempt in range(20):  # the watch may only just be beginning
            self._told.clear()
            (self.path / "CURRENT").write_text(str(attempt))
            if self._told.wait(0.5):
                return True
        return False

    def rest(self) -> None:
        """Wait until nothing has been told for a while, and forget what was."""
        while True:
            self._told.clear()
            if not self._told.wait(0.3):
                return

    def stop(self) -> None:
        """End the notices."""
        self._notices.stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look every tenth of a second whether the directory is still the same."""
    monkeypatch.setattr(notices, "_CHECK_S", 0.1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory, in a folder of its own."""
    root = tmp_path / "above" / "store"
    root.mkdir(parents=True)
    return root


@pytest.fixture
def listener(root: Path) -> Iterator[Listener]:
    """A listener to that directory, which has heard all that there was to hear."""
    listener = Listener(root)
    listener.rest()
    yield listener
    listener.stop()


def test_a_write_is_told_at_once(listener: Listener) -> None:
    """A new file in the directory is told in much less than a second."""
    began = time.monotonic()
    (listener.path / "CURRENT").write_text("1")
    assert listener.hears()
    assert time.monotonic() - began < 0.5


def test_what_happens_beside_the_directory_is_not_told(listener: Listener) -> None:
    """The folder above may be a busy one."""
    for name in ("store2", "stor", "another"):
        (listener.path.parent / name).mkdir()
    assert not listener.hears(0.3)


def test_a_directory_that_is_deleted_and_made_again_is_followed(listener: Listener) -> None:
    """The new directory under the old path is noticed, and so is what is written there."""
    shutil.rmtree(listener.path)
    listener.path.mkdir()
    assert listener.hears()
    assert listener.hears_a_write()


def test_a_directory_that_is_replaced_is_followed(listener: Listener) -> None:
    """A directory renamed into the place of the old one is the one that counts from then on."""
    other = listener.path.parent / "other"
    other.mkdir()
    listener.path.rename(listener.path.parent / "old")
    other.rename(listener.path)
    assert listener.hears()
    assert listener.hears_a_write()


def test_a_link_that_is_turned_is_followed(root: Path) -> None:
    """A link may lead to another directory from one moment to the next."""
    others = [root / "first", root / "second"]
    for other in others:
        other.mkdir()
    link, turned = root / "link", root / "turned"
    link.symlink_to(others[0])
    listener = Listener(link)
    try:
        assert listener.hears_a_write()
        turned.symlink_to(others[1])
        turned.replace(link)
        assert listener.hears_a_write()
        assert (others[1] / "CURRENT").exists()
    finally:
        listener.stop()


def test_a_directory_may_come_later_with_all_that_is_above_it(tmp_path: Path) -> None:
    """Nothing need be there when the notices begin."""
    path = tmp_path / "not" / "yet"
    listener = Listener(path)
    try:
        assert not listener.hears(0.1)
        path.mkdir(parents=True)
        assert listener.hears()
        assert listener.hears_a_write()
    finally:
        listener.stop()


def test_no_notifications_to_be_had_is_said_once_and_when_it_changes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system has no more watches to give, one line says so, and another when it has again."""
    attempts: list[tuple[Path, ...]] = []

    def watch(*folders: Path, **options: Any) -> Any:
        attempts.append(folders)
        if len(attempts) < 6:
            raise OSError("inotify: no more instances")
        return watchfiles.watch(*folders, **options)

    monkeypatch.setattr(notices, "watch", watch)
    monkeypatch.setattr(notices, "_CHECK_S", 0.01)
    with structlog.testing.capture_logs() as entries:
        listener = Listener(root)
        try:
            wait_for(lambda: len(attempts) == 6, what="six attempts")
            assert listener.hears_a_write()
        finally:
            listener.stop()
    assert [entry["event"] for entry in entries] == [
        "watching without notifications",
        "watching with notifications again",
    ]
