"""A term: one publisher's turn at a store, and the commits it makes there.

Versions of one store are a line: each number is committed once, by an exclusive create. A publisher takes the term
after the newest one it finds, counts on from there, and never looks at the listing again; so a publisher that was
overtaken collides with its successor's first version, sees the higher term, and stops. No locks, no leases, no clocks.
"""

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from emaswap.errors import BadVersion, Fenced, Missing, PublishError, StoreError
from emaswap.files.digest import Digest, digest_of
from emaswap.store import Store
from emaswap.store.versions import manifest_key
from emaswap.versions.manifest import Manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """The place in the line that a manifest is about to take: what it must say of itself."""

    version: int
    term: int
    run: str
    parent: Digest | None


class Term:
    """A turn at publishing to a store. Opening one repairs CURRENT, which a killed publisher may have left behind."""

    def __init__(self, store: Store, model: str) -> None:
        """Raises `PublishError` when the store holds versions of a model of another name."""
        store.prepare()
        self.store = store
        self.run = uuid.uuid4().hex
        self.version = store.newest()
        self.parent: Digest | None = None
        newest, unreadable = self._newest_readable()
        if newest is not None:
            if newest.model != model:
                raise PublishError(
                    f"{store.location} holds versions of {newest.model!r}, not of {model!r}: a store is for one model"
                )
            if not unreadable:
                self.parent = digest_of(store.manifest_bytes(newest.version))
        # Each version raises the term by one at the most, so this is above that of every unreadable one.
        self.term = (newest.term if newest else 0) + unreadable + 1
        if self.version and store.hint() != self.version:
            store.point_to(self.version)

    def _newest_readable(self) -> tuple[Manifest | None, int]:
        unreadable = 0
        for version in reversed(self.store.versions()):
            try:
                return self.store.manifest(version), unreadable
            except (BadVersion, Missing) as error:
                log.warning("version %d in %s cannot be read: %s", version, self.store.location, error)
                unreadable += 1
        return None, unreadable

    def commit(self, describe: Callable[[Place], Manifest]) -> Manifest:
        """Commit the next version. The files that its manifest names must be in the store already.

        Args:
            describe: makes the manifest for a place; called again when the place was lost to a zombie.

        Raises:
            Fenced: when another publisher, of a higher term or the same one, has taken the place.
            StoreError: when the store cannot be written; nothing was committed then.
        """
        while True:
            place = Place(self.version + 1, self.term, self.run, self.parent)
            manifest = describe(place)
            data = manifest.encode()
            if self.store.create(manifest_key(place.version), data):
                self.version, self.parent = place.version, digest_of(data)
                self._point()
                return manifest
            self._pass_over(place.version)

    def _pass_over(self, version: int) -> None:
        """Another's version stands where ours should: stop, or go on behind it if it is a zombie's."""
        try:
            winner = self.store.manifest(version)
        except BadVersion as error:
            log.warning("passing over version %d in %s, which cannot be read: %s", version, self.store.location, error)
            self.version, self.parent = version, None
            return
        # Our own commit, reported to us as an error, is no reason to stop.
        if winner.term >= self.term and winner.run != self.run:
            raise Fenced(
                f"run {winner.run} (term {winner.term}) published version {version} to {self.store.location} where run "
                f"{self.run} (term {self.term}) was to: another publisher has taken over; stop this one, or the other"
            )
        self.version, self.parent = version, digest_of(self.store.manifest_bytes(version))

    def _point(self) -> None:
        try:
            if self.store.hint() < self.version:
                self.store.point_to(self.version)
        except StoreError as error:
            # The version is committed and will be found without the hint; the next commit sets it right.
            log.warning("version %d is published, but CURRENT does not say so yet: %s", self.version, error)
