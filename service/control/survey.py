"""A survey: one look at the store, compared with what the service holds. It blocks, so it runs on a lane."""

from collections.abc import Collection
from dataclasses import dataclass

from emaswap import BadVersion, Identity, Missing, Pin, Store, Unreadable
from emaswap.store.look import Look
from service.control.quarantine import Stamps


@dataclass(frozen=True)
class Survey:
    """What a look showed.

    Attributes:
        look: the versions in the store, and the pin.
        manifests: the stamp of each version's manifest, in ascending order of the versions.
        live_stamp: the stamp of the live version's manifest; `None` when the store no longer has that version.
        pin_is_foreign: the number that was pinned belongs to another version than the pinned one.
        stamps: those of the files of rejected versions that were looked at again.
    """

    look: Look
    manifests: dict[int, str]
    live_stamp: str | None
    pin_is_foreign: bool
    stamps: dict[int, Stamps]


def survey(
    store: Store,
    live: Identity | None,
    live_stamp: str | None,
    rejected: Collection[int],
    to_check: Collection[int],
) -> Survey:
    """Look at the store.

    Args:
        store: to look at; it is listed once.
        live: the live version.
        live_stamp: of its manifest, when it was last seen in the store.
        rejected: the versions that were rejected; the pinned one of them is looked at again.
        to_check: further rejected versions to look at again.

    Raises:
        StoreError: the store as a whole cannot be read just now.
    """
    look = store.look()
    manifests = {seen.version: seen.stamp for seen in look.versions}
    pinned = {look.pin.version} & set(rejected) if look.pin else set()
    return Survey(
        look,
        manifests,
        _find(store, look, live, live_stamp) if live else None,
        look.pin is not None and _is_foreign(store, look, look.pin, live),
        {version: store.stamps(version) for version in {*to_check, *pinned} & manifests.keys()},
    )


def _find(store: Store, look: Look, live: Identity, stamp: str | None) -> str | None:
    seen = look.get(live.version)
    if seen and seen.stamp == stamp:
        return stamp
    if seen is None and not store.has(live.version):  # a listing may lag behind
        return None
    now = seen.stamp if seen else stamp or ""
    try:
        return now if store.identity(live.version) == live else None
    except (Missing, BadVersion):
        return None
    except Unreadable:
        return now  # nothing shows that it is another


def _is_foreign(store: Store, look: Look, pin: Pin, live: Identity | None) -> bool:
    if pin.digest is None or look.get(pin.version) is None or (live and pin.names(live)):
        return False
    try:
        return not pin.names(store.identity(pin.version))
    except (Missing, BadVersion, Unreadable):
        return False  # loading it will tell
