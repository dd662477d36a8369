"""Notices from the file system that something in a directory has changed. They only make the watcher quicker than its poll.

A directory that was deleted and made again, renamed, or reached by a link that was turned, is another one under the same
path: it is found again by itself.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import structlog
from watchfiles import Change, watch

log = structlog.get_logger("emaswap.service")

# How long changes are gathered before they are told.
_SETTLE_MS = 20
_STEP_MS = 5
# How often to see whether the path still leads to the same directory.
_CHECK_S = 1.0
_LONGEST_PAUSE_S = 60.0


class Notices:
    """Tells when entries of a directory change, from a thread of its own. The directory need not be there yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stopped = threading.Event()
        self._failing = False

    def start(self, tell: Callable[[], None]) -> None:
        """Begin. `tell` is called on another thread."""
        threading.Thread(target=self._run, args=(tell,), name="emaswap-notices", daemon=True).start()

    def stop(self) -> None:
        """End soon, without waiting for a file system that does not answer."""
        self._stopped.set()

    def _run(self, tell: Callable[[], None]) -> None:
        pause_s = _CHECK_S
        while not self._stopped.is_set():
            try:
                self._follow(tell)
                pause_s = _CHECK_S
            except Exception as error:  # no inotify here, or no more of it: the poll alone will do
                if not self._failing:
                    log.warning("watching without notifications", path=str(self._path), error=str(error))
                self._failing = True
                self._stopped.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _follow(self, tell: Callable[[], None]) -> None:
        """Watch the directory that is there now, until another one is, or there may be one to watch."""
        path, here = str(self._path), _place(self._path)
        # From the folder above it shows at once that the directory has gone, or has come.
        folders = [folder for folder in (self._path, self._path.parent) if os.access(folder, os.R_OK)]
        if not folders:
            self._stopped.wait(_CHECK_S)
            return

        def concerns(_: Change, changed: str) -> bool:
            return changed == path or changed.startswith(f"{path}/")

        missed = True  # what changed before the watch began
        for changes in watch(
            *folders,
            watch_filter=concerns,
            debounce=_SETTLE_MS,
            step=_STEP_MS,
            stop_event=self._stopped,
            rust_timeout=round(1000 * _CHECK_S),
            yield_on_timeout=True,
            raise_interrupt=False,
            recursive=False,
        ):
            if self._failing:
                log.info("watching with notifications again", path=path)
                self._failing = False
            another = any(changed == path for _, changed in changes) or _place(self._path) != here
            if changes or another or missed:
                tell()
            missed = False
            if another:
                return


def _place(path: Path) -> tuple[int, int] | None:
    """Return what tells a directory from every other that there is at the time; `None` where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
