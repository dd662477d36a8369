"""The writer: stores editions, files first and then the commit, and prunes old versions.

It makes room when the disk is full, and begins a new line when the store was deleted.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from emaswap.errors import EmaswapError, Fenced, Missing, Short, StoreError
from emaswap.files.digest import Algorithm
from emaswap.files.tensor_file import Blob
from emaswap.publishing.edition import Edition, Editor, Part
from emaswap.publishing.snapshot import PrivateCopy
from emaswap.store import Store
from emaswap.store.line import Term
from emaswap.store.look import in_line
from emaswap.store.retention import Retention
from emaswap.versions.manifest import Manifest, ProbeInfo, Variant, WeightsInfo

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Writer:
    """One publisher's turn at writing to a store."""

    def __init__(
        self, editor: Editor, store: Store, name: str, *, algorithm: Algorithm, keep: int, grace_s: float
    ) -> None:
        """Take the next term. See `Publisher` for the arguments and what is raised."""
        self.store = store
        self._editor = editor
        self._name = name
        self._algorithm: Algorithm = algorithm
        self._retention = Retention(store, keep=keep, grace_s=grace_s)
        self._term = self._with_room(lambda: Term(store, name))
        self._retention.clean()

    def publish(self, copied: PrivateCopy) -> Manifest:
        """Publish a private copy as the next version.

        Raises `Fenced` when another publisher has taken the store over, `StoreError` when it cannot be written, and
        whatever the editor raises.
        """
        edition = self._editor.edit(copied)
        if self._term.version and not self.store.has(self._term.version):
            self._begin_anew()
        try:
            manifest = self._with_room(lambda: self._commit(edition))
        except Missing as error:
            log.warning("%s", error)
            self._begin_anew()
            manifest = self._commit(edition)
        self._prune()
        return manifest

    def _commit(self, edition: Edition) -> Manifest:
        added: list[Blob] = []
        try:
            stored = {variant: self._add(part, added) for variant, part in edition.parts.items()}
            return self._term.commit(lambda place: edition.describe(self._name, place, stored))
        except StoreError:
            # Where the disk is full, files without a version would make it worse each time.
            with suppress(EmaswapError):
                self._retention.discard(added)
            raise

    def _add(self, part: Part, added: list[Blob]) -> Variant:
        """Store the files of a part, and append them to `added` one by one."""
        weights = self.store.add_tensors("weights", part.tensors, self._algorithm)
        added.append(weights)
        probe = self.store.add_tensors("probes", part.probe.to_tensors(), self._algorithm)
        added.append(probe)
        return Variant(
            weights=WeightsInfo(digest=weights.digest, size=weights.size, tensors=part.table),
            ema=part.ema,
            probe=ProbeInfo(digest=probe.digest, size=probe.size, rtol=part.rtol, atol=part.atol),
        )

    def _with_room(self, work: Callable[[], Result]) -> Result:
        """Run work that writes. If the disk is full, prune what retention allows and try once more."""
        try:
            return work()
        except Short as error:
            log.warning("%s; pruning old versions, then trying again", error)
            self._prune()
            return work()

    def _prune(self) -> None:
        try:
            self._retention.prune()
        except EmaswapError as error:
            log.warning("old versions were not pruned: %s", error)

    def _begin_anew(self) -> None:
        """Take a term of the store as it is now: it was deleted, or restored from a backup.

        Raises `Fenced` when another publisher has published there in the meantime.
        """
        term = Term(self.store, self._name)
        newest = self._newest()
        if newest is not None and newest.run != self._term.run and newest.term >= self._term.term:
            raise Fenced(
                f"{self.store.location} was started anew: run {newest.run} (term {newest.term}) published version "
                f"{newest.version} there, where run {self._term.run} (term {self._term.term}) was publishing; stop this "
                "publisher, or the other"
            )
        log.warning(
            "version %d is not in %s any more, which was deleted or restored: continuing with version %d",
            self._term.version,
            self.store.location,
            term.version + 1,
        )
        self._term = term

    def _newest(self) -> Manifest | None:
        numbers = in_line(tuple(self.store.versions()))
        return next(filter(None, map(self.store.readable, reversed(numbers))), None)
