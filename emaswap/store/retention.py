"""Retention: which old versions a store lets go of, and their deletion.

Kept are the newest, the pinned, and everything younger than a grace period, so that a reader who has just found a
version can still fetch it, and a publisher can commit one whose files it has just written. Of the first version of a
term the manifest stays for good: it is what a zombie of the term before collides with. What is not recognised is never
deleted.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from emaswap.errors import BadVersion, EmaswapError, Missing, StoreError, Unreadable
from emaswap.files.digest import Digest
from emaswap.files.tensor_file import Blob
from emaswap.store import Store
from emaswap.store.files import Entry
from emaswap.store.keys import KINDS, manifest_key, tensors_key
from emaswap.store.look import Look

_ORPHAN_AGE_S = 3600.0


@dataclass(frozen=True)
class Facts:
    """What retention needs to know of a version."""

    term: int
    keys: frozenset[str]


class Retention:
    """Prunes one store; remembers manifests it has read, as long as they are as they were."""

    def __init__(self, store: Store, *, keep: int = 10, grace_s: float = 60.0) -> None:
        """Keep the newest `keep` versions (at least one), and all that are younger than `grace_s` seconds."""
        if keep < 1:
            raise EmaswapError(f"at least one version must be kept, got keep={keep}")
        self.store = store
        self.keep = keep
        self.grace_s = grace_s
        self._read: dict[int, tuple[str, Facts | None]] = {}

    def prune(self) -> list[int]:
        """Delete what need not be kept; return the numbers of the versions whose weights went, oldest first.

        Raises `StoreError` when something could not be deleted, after all the rest.
        """
        look = self.store.look()
        facts = self._facts(look)
        doomed = self._doomed(look, facts)
        if not doomed:
            return []
        kept_keys = {key for version, each in facts.items() if version not in doomed for key in each.keys}
        openers = _openers(facts)
        there = {tensors_key(kind, digest) for kind in KINDS for digest in self.store.stored(kind)}
        pruned = []
        failure: StoreError | None = None
        for version in doomed:
            gone = [key for key in sorted((facts[version].keys - kept_keys) & there) if not self._is_young(key)]
            there.difference_update(gone)
            if version not in openers:
                # The manifest goes first: a reader then finds no version, rather than one without its weights.
                gone.insert(0, manifest_key(version))
            try:
                for key in gone:
                    self.store.files.delete(key)
            except StoreError as error:
                failure = failure or error
            else:
                pruned += [version] if gone else []
        if failure:
            raise failure
        return pruned

    def clean(self) -> list[str]:
        """Delete tensor files that no version names: a publisher was killed before its commit. Returns their keys."""
        return self._clean(lambda _, entry: entry.age_s > _ORPHAN_AGE_S)

    def discard(self, blobs: Collection[Blob]) -> list[str]:
        """Delete tensor files of a version that came to nothing, unless another names them. Returns their keys."""
        digests = {blob.digest for blob in blobs}
        return self._clean(lambda digest, _: digest in digests)

    def _clean(self, is_orphan: Callable[[Digest, Entry], bool]) -> list[str]:
        look = self.store.seen()
        facts = self._facts(look)
        if len(facts) < len(look.versions):
            return []  # an unreadable manifest may name any of them
        named = {key for each in facts.values() for key in each.keys}
        orphans = [
            key
            for kind in KINDS
            for digest, entry in self.store.stored(kind).items()
            if is_orphan(digest, entry) and (key := tensors_key(kind, digest)) not in named
        ]
        for key in orphans:
            self.store.files.delete(key)
        return orphans

    def _is_young(self, key: str) -> bool:
        """Return whether a file was written within the grace period: a version that names it may be about to be committed.

        The same weights may be published again while the version that had them is falling out.
        """
        entry = self.store.files.entry(key)
        return entry is not None and entry.age_s <= self.grace_s

    def _doomed(self, look: Look, facts: Mapping[int, Facts]) -> list[int]:
        # What cannot be understood is kept anyway, and takes the place of none that can be.
        newest = [version for version in look.in_line if version in facts][-self.keep :]
        return [
            seen.version
            for seen in look.versions
            if seen.version not in newest
            and not (look.pin and look.pin.version == seen.version)
            and seen.age_s > self.grace_s
            and seen.version in facts
        ]

    def _facts(self, look: Look) -> dict[int, Facts]:
        """Return the facts of all versions whose manifests can be read, by ascending number."""
        before, self._read = self._read, {}
        for seen in look.versions:
            known = before.get(seen.version)
            if known is None or known[0] != seen.stamp:
                try:
                    known = seen.stamp, self._of(seen.version)
                except (Missing, Unreadable):
                    continue
            self._read[seen.version] = known
        return {version: facts for version, (_, facts) in self._read.items() if facts}

    def _of(self, version: int) -> Facts | None:
        try:
            manifest = self.store.manifest(version)
        except BadVersion:
            return None
        return Facts(manifest.term, frozenset(tensors_key(kind, blob.digest) for kind, blob in manifest.files()))


def _openers(facts: Mapping[int, Facts]) -> set[int]:
    """Return the versions that open a term."""
    first: dict[int, int] = {}
    for version, each in facts.items():
        first.setdefault(each.term, version)
    return set(first.values())
