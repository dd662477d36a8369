"""One look at a store: which versions are there and what operators say, taken from one listing and never changed."""

from dataclasses import dataclass
from functools import cached_property

from pydantic import BaseModel, ConfigDict, ValidationError

from emaswap.errors import Missing, NotAFile, TooLarge, Unreadable
from emaswap.store.files import Entry, Files, read
from emaswap.store.keys import CURRENT, MAX_NOTE_BYTES, VERSIONS, manifest_key, version_of
from emaswap.versions.manifest import Pin, Version

MAX_GAP = 10**9
"""How far a number may be above the one before it: at ten versions a second, what retention leaves out in three years."""


class _Current(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)

    version: Version


@dataclass(frozen=True)
class Seen:
    """A version in a look. `stamp` changes when the manifest's bytes may have; `age_s` counts from its commit."""

    version: int
    stamp: str
    age_s: float


@dataclass(frozen=True)
class Look:
    """All versions by ascending number, and the pin in force."""

    versions: tuple[Seen, ...]
    pin: Pin | None = None

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of all versions, ascending."""
        return tuple(seen.version for seen in self.versions)

    @cached_property
    def in_line(self) -> tuple[int, ...]:
        """The numbers without those that no publisher can have reached, ascending."""
        return in_line(self.numbers)

    @property
    def newest(self) -> int:
        """The newest number in the line, 0 when there is none."""
        return self.in_line[-1] if self.in_line else 0

    def get(self, version: int) -> Seen | None:
        """Return what was seen of a version; `None` when it was not there."""
        return self._by_number.get(version)

    @cached_property
    def _by_number(self) -> dict[int, Seen]:
        return {seen.version: seen for seen in self.versions}


def in_line(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ascending numbers up to the first that is more than `MAX_GAP` above the one before it."""
    before = 0
    for index, number in enumerate(numbers):
        if number - before > MAX_GAP:
            return numbers[:index]
        before = number
    return numbers


def seen(files: Files) -> tuple[Seen, ...]:
    """List the committed versions, ascending.

    The listing, CURRENT and the next number are asked together: a listing may lag behind on a network file system, and
    a publisher may die between its commit and CURRENT.
    """
    listed = ((version_of(name), entry) for name, entry in files.entries(VERSIONS).items())
    found = {version: Seen(version, entry.stamp, entry.age_s) for version, entry in listed if version}
    numbers = in_line(tuple(sorted(found)))
    newest = numbers[-1] if numbers else 0
    hinted = hint(files)
    ahead = hinted if newest < hinted <= newest + MAX_GAP and _entry(files, hinted) else newest + 1
    while entry := _entry(files, ahead):
        found[ahead] = Seen(ahead, entry.stamp, entry.age_s)
        ahead += 1
    return tuple(found[version] for version in sorted(found))


def including(files: Files, versions: tuple[Seen, ...], version: int) -> tuple[Seen, ...]:
    """Return versions that were listed, with one more that may have been committed since, if it is there."""
    if any(each.version == version for each in versions) or not (entry := _entry(files, version)):
        return versions
    further = Seen(version, entry.stamp, entry.age_s)
    return tuple(sorted((*versions, further), key=lambda each: each.version))


def hint(files: Files) -> int:
    """Return what CURRENT says; 0 when it is not there, says nothing that can be understood, or cannot be read."""
    try:
        return _Current.model_validate_json(read(files, CURRENT, MAX_NOTE_BYTES)).version
    except (Missing, NotAFile, TooLarge, Unreadable, ValidationError):
        return 0


def point_to(files: Files, version: int) -> None:
    """Make CURRENT name this version."""
    files.replace(CURRENT, _Current(version=version).model_dump_json().encode())


def _entry(files: Files, version: int) -> Entry | None:
    try:
        return files.entry(manifest_key(version))
    except Unreadable:
        return None
