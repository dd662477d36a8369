"""Retention: which old versions a store lets go of, and their deletion.

Kept are the newest, the pinned, and everything younger than a grace period, so that a reader who has just found a
version can still fetch it. Of the first version of a term the manifest stays for good: it is what a zombie of the
term before collides with. What is not recognised is never deleted.
"""

from dataclasses import dataclass

from emaswap.errors import EmaswapError
from emaswap.store import Store
from emaswap.store.keys import KINDS, manifest_key, tensors_key
from emaswap.store.look import Look

_ORPHAN_AGE_S = 3600.0


@dataclass(frozen=True)
class Facts:
    """What retention needs to know of a version."""

    term: int
    keys: frozenset[str]


class Retention:
    """Prunes one store; remembers manifests it has read, since they never change."""

    def __init__(self, store: Store, *, keep: int = 10, grace_s: float = 60.0) -> None:
        """Keep the newest `keep` versions (at least one), and all that are younger than `grace_s` seconds."""
        if keep < 1:
            raise EmaswapError(f"at least one version must be kept, got keep={keep}")
        self.store = store
        self.keep = keep
        self.grace_s = grace_s
        self._facts: dict[int, Facts | None] = {}

    def prune(self) -> list[int]:
        """Delete what need not be kept; return the numbers of the versions whose weights went, oldest first."""
        look = self.store.look()
        doomed = self._doomed(look)
        if not doomed:
            return []
        kept_keys = {key for version in look.numbers if version not in doomed for key in self._keys(version)}
        openers = self._openers(look)
        there = {tensors_key(kind, digest) for kind in KINDS for digest in self.store.stored(kind)}
        pruned = []
        for version in doomed:
            gone = sorted((self._keys(version) - kept_keys) & there)
            there.difference_update(gone)
            if version not in openers:
                # The manifest goes first: a reader then finds no version, rather than one without its weights.
                gone.insert(0, manifest_key(version))
            for key in gone:
                self.store.files.delete(key)
            if gone:
                pruned.append(version)
        self._facts = {version: facts for version, facts in self._facts.items() if version in look.numbers}
        return pruned

    def clean(self) -> list[str]:
        """Delete tensor files that no version names: a publisher was killed before its commit. Returns their keys."""
        versions = self.store.versions()
        if not all(self._read(version) for version in versions):
            return []  # an unreadable manifest may name any of them
        named = {key for version in versions for key in self._keys(version)}
        orphans = [
            key
            for kind in KINDS
            for digest, entry in self.store.stored(kind).items()
            if entry.age_s > _ORPHAN_AGE_S and (key := tensors_key(kind, digest)) not in named
        ]
        for key in orphans:
            self.store.files.delete(key)
        return orphans

    def _doomed(self, look: Look) -> list[int]:
        newest = look.in_line[-self.keep :]
        return [
            seen.version
            for seen in look.versions
            if seen.version not in newest
            and not (look.pin and look.pin.version == seen.version)
            and seen.age_s > self.grace_s
            and self._read(seen.version)
        ]

    def _openers(self, look: Look) -> set[int]:
        """Return the versions that open a term."""
        first: dict[int, int] = {}
        for version in look.numbers:
            if facts := self._read(version):
                first.setdefault(facts.term, version)
        return set(first.values())

    def _keys(self, version: int) -> frozenset[str]:
        facts = self._read(version)
        return facts.keys if facts else frozenset()

    def _read(self, version: int) -> Facts | None:
        if version not in self._facts:
            manifest = self.store.readable(version)
            self._facts[version] = (
                Facts(manifest.term, frozenset(tensors_key(kind, blob.digest) for kind, blob in manifest.files()))
                if manifest
                else None
            )
        return self._facts[version]
