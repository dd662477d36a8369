"""Retention: which old versions a store lets go of, and their deletion.

Kept are the newest, the pinned, and everything younger than a grace period, so that a reader who has just found a
version can still fetch it. Of the first version of a term the manifest stays for good: it is what a zombie of the
term before collides with. What is not recognised is never deleted.
"""

import re
from dataclasses import dataclass

from emaswap.errors import BadVersion, EmaswapError, Missing
from emaswap.store import Store
from emaswap.store.versions import Kind, manifest_key, tensors_key
from emaswap.versions.manifest import Manifest, Variant

_ORPHAN_AGE_S = 3600.0
_TENSORS_NAME = re.compile(r"(blake3|sha256)-[0-9a-f]{64}\.safetensors")
_KINDS: tuple[Kind, ...] = ("weights", "probes")


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
        """Delete what need not be kept; the numbers of the versions whose weights went, oldest first."""
        versions = self.store.versions()
        doomed = self._doomed(versions)
        if not doomed:
            return []
        kept_keys = {key for version in versions if version not in doomed for key in self._keys(version)}
        openers = self._openers(versions)
        pruned = []
        for version in doomed:
            gone = [key for key in self._keys(version) - kept_keys if self.store.stamp(key) is not None]
            if version not in openers:
                # The manifest goes first: a reader then finds no version, rather than one without its weights.
                gone.insert(0, manifest_key(version))
            for key in gone:
                self.store.delete(key)
            if gone:
                pruned.append(version)
        self._facts = {version: facts for version, facts in self._facts.items() if version in versions}
        return pruned

    def clean(self) -> list[str]:
        """Delete tensor files that no version names: a publisher was killed before its commit. Returns their keys."""
        versions = self.store.versions()
        if not all(self._read(version) for version in versions):
            return []  # an unreadable manifest may name any of them
        named = {key for version in versions for key in self._keys(version)}
        orphans = [
            f"{kind}/{name}"
            for kind in _KINDS
            for name, age_s in self.store.names(kind).items()
            if age_s > _ORPHAN_AGE_S and _TENSORS_NAME.fullmatch(name) and f"{kind}/{name}" not in named
        ]
        for key in orphans:
            self.store.delete(key)
        return orphans

    def _doomed(self, versions: list[int]) -> list[int]:
        ages = self.store.names("versions")
        pin = self.store.pin()
        return [
            version
            for version in versions[: -self.keep]
            if (pin is None or version != pin.version)
            and ages.get(manifest_key(version).removeprefix("versions/"), 0.0) > self.grace_s
            and self._read(version)
        ]

    def _openers(self, versions: list[int]) -> set[int]:
        """The versions that open a term."""
        first: dict[int, int] = {}
        for version in versions:
            if facts := self._read(version):
                first.setdefault(facts.term, version)
        return set(first.values())

    def _keys(self, version: int) -> frozenset[str]:
        facts = self._read(version)
        return facts.keys if facts else frozenset()

    def _read(self, version: int) -> Facts | None:
        if version not in self._facts:
            try:
                self._facts[version] = _facts(self.store.manifest(version))
            except (BadVersion, Missing):
                self._facts[version] = None
        return self._facts[version]


def _facts(manifest: Manifest) -> Facts:
    parts: list[Manifest | Variant] = [manifest, *manifest.variants.values()]
    weights = (tensors_key("weights", part.weights.digest) for part in parts)
    probes = (tensors_key("probes", part.probe.digest) for part in parts)
    return Facts(manifest.term, frozenset((*weights, *probes)))
