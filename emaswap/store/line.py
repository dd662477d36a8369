"""The line of versions: a publisher's turn in it, and the reader's rule about who is out of it.

Versions of one store are a line: each number is committed once, by an exclusive create. A publisher takes the term
after the newest one it finds, counts on from there, and never looks at the listing again; so a publisher that was
overtaken collides with its successor's first version, sees the higher term, and stops. No locks, no leases, no clocks.
"""

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from emaswap.errors import BadVersion, Fenced, Missing, PublishError, Reason, StoreError, Unreadable
from emaswap.files.digest import Digest, digest_of
from emaswap.store import Store
from emaswap.store.look import MAX_GAP, Look, in_line
from emaswap.versions.manifest import MAX_MANIFEST_BYTES, Manifest

log = logging.getLogger(__name__)

MAX_LEAD = 1000
"""How far a term may be above its version's number. Each term begins with a version of its own, so none should be."""

_LOOK_BACK = 64


def check_place(manifest: Manifest, numbers: Sequence[int], terms: Mapping[int, int]) -> None:
    """Raise `BadVersion` when a version is out of line: a replaced publisher's, or further ahead than anyone can be.

    Args:
        manifest: of the version in question.
        numbers: of all versions in the store, ascending.
        terms: of as many versions as are known, by number.
    """
    check_term(manifest)
    version, term = manifest.version, manifest.term
    if version not in in_line(tuple(sorted({*numbers, version}))):
        raise BadVersion(
            Reason.OUT_OF_LINE,
            f"number {version} is more than {MAX_GAP} above the one before it, and no publisher can have reached it",
        )
    above = max(
        (known for number, known in terms.items() if number < version and known <= number + MAX_LEAD), default=0
    )
    if term < above:
        raise BadVersion(
            Reason.STALE_TERM,
            f"term {term} is below term {above} of an earlier version: its publisher had been replaced",
        )


def check_term(manifest: Manifest) -> None:
    """Raise `BadVersion` when a version's term is one that no publisher can have reached."""
    if manifest.term > manifest.version + MAX_LEAD:
        raise BadVersion(
            Reason.OUT_OF_LINE,
            f"term {manifest.term} is more than {MAX_LEAD} above the version's number {manifest.version}, though each "
            "term begins with a version of its own",
        )


class Line:
    """What a reader knows of the terms in a store. It remembers those of versions that are as they were."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._terms: dict[int, tuple[str, int | None]] = {}

    def check(self, manifest: Manifest, look: Look) -> None:
        """Raise `BadVersion` when a version of this look is out of line.

        Of the versions before it, the last 64 are read if they have not been read before.
        """
        self._terms = {
            each.version: self._terms[each.version]
            for each in look.versions
            if each.version in self._terms and self._terms[each.version][0] == each.stamp
        }
        for each in [each for each in look.versions if each.version < manifest.version][-_LOOK_BACK:]:
            if each.version not in self._terms:
                with suppress(Missing, Unreadable):  # it may be read next time
                    self._terms[each.version] = each.stamp, self._term_of(each.version)
        known = {version: term for version, (_, term) in self._terms.items() if term is not None}
        check_place(manifest, look.numbers, known)

    def _term_of(self, version: int) -> int | None:
        try:
            return self._store.manifest(version).term
        except BadVersion:
            return None


@dataclass(frozen=True)
class Place:
    """The place in the line that a manifest is about to take: what it must say of itself."""

    version: int
    term: int
    run: str
    parent: Digest | None


class Term:
    """A turn at publishing to a store.

    Opening a term brings CURRENT up to date if a killed publisher committed without updating it.
    """

    def __init__(self, store: Store, model: str) -> None:
        """Raises `PublishError` when the store holds versions of a model of another name."""
        store.prepare()
        self.store = store
        self.run = uuid.uuid4().hex
        look = store.seen()
        self.version = look.newest
        self.parent: Digest | None = None
        newest, passed_over = self._newest_readable(look)
        if newest is not None:
            if newest.model != model:
                raise PublishError(
                    f"{store.location} holds versions of {newest.model!r}, not of {model!r}: a store is for one model"
                )
            if not passed_over:
                self.parent = newest.identity.digest
        # Each version raises the term by one at the most, so this is above that of every version passed over.
        self.term = (newest.term if newest else 0) + passed_over + 1
        self._point(unless=lambda hinted: hinted == self.version or not self.version)

    def _newest_readable(self, look: Look) -> tuple[Manifest | None, int]:
        passed_over = 0
        for version in reversed(look.in_line):
            try:
                manifest = self.store.manifest(version)
                check_term(manifest)
            except (BadVersion, Missing, Unreadable) as error:
                log.warning("passing over version %d in %s: %s", version, self.store.location, error)
                passed_over += 1
            else:
                return manifest, passed_over
        return None, passed_over

    def commit(self, describe: Callable[[Place], Manifest]) -> Manifest:
        """Commit the next version. The files that its manifest names must be in the store already.

        Args:
            describe: makes the manifest for a place; called again when the place was lost to a zombie.

        Raises:
            Fenced: when another publisher, of a higher term or the same one, has taken the place.
            PublishError: when the manifest is larger than readers take.
            StoreError: when the store cannot be written; nothing was committed then.
        """
        while True:
            place = Place(self.version + 1, self.term, self.run, self.parent)
            manifest = describe(place)
            data = manifest.encode()
            if len(data) > MAX_MANIFEST_BYTES:
                raise PublishError(
                    f"the manifest would have {len(data)} bytes, and readers take at most {MAX_MANIFEST_BYTES}: publish "
                    "fewer tensors, variants, metrics or arguments"
                )
            if self.store.commit(place.version, data):
                self.version, self.parent = place.version, digest_of(data)
                self._point(unless=lambda hinted: hinted >= self.version)
                return manifest
            self._pass_over(place.version)

    def _pass_over(self, version: int) -> None:
        """Stop when another's version stands where ours should, or go on behind it if it is a zombie's."""
        try:
            winner = self.store.manifest(version)
            check_term(winner)
        except (BadVersion, Unreadable) as error:
            log.warning("passing over version %d in %s: %s", version, self.store.location, error)
            self.version, self.parent = version, None
            return
        # Our own commit, reported to us as an error, is no reason to stop.
        if winner.term >= self.term and winner.run != self.run:
            raise Fenced(
                f"run {winner.run} (term {winner.term}) published version {version} to {self.store.location} where run "
                f"{self.run} (term {self.term}) was to: another publisher has taken over; stop this one, or the other"
            )
        self.version, self.parent = version, winner.identity.digest

    def _point(self, *, unless: Callable[[int], bool]) -> None:
        """Make CURRENT name our version, unless what it says is good. It is a hint: no trouble with it is an error."""
        try:
            if not unless(self.store.hint()):
                self.store.point_to(self.version)
        except StoreError as error:
            # Versions are found without the hint; the next commit tries again to set it right.
            log.warning("CURRENT in %s does not name version %d: %s", self.store.location, self.version, error)
