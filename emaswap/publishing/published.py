"""The averages that were published to a store, as snapshots that an average can be synthesised from."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from emaswap.averaging.schedule import from_description
from emaswap.averaging.synthesis import Snapshot, State
from emaswap.errors import EmaError
from emaswap.files.tensor_file import Blob
from emaswap.store import Store, open_store
from emaswap.versions.manifest import EmaInfo, Manifest


def snapshots_of(store: Store | str | Path, *, profile: str | None = None, since: int = 1) -> list[Snapshot]:
    """The published averages of a store, oldest first; their weights are read when they are combined.

    Args:
        store: a store, or the location of one.
        profile: the published profile to take, instead of the average itself.
        since: the first version to take: with a store that has seen several training runs, that of the last one.

    Versions that were pruned or cannot be read are passed over; so are those that a resumed training went back before.
    Raises `EmaError` when there is none, or when one's schedule is of a class of your own.
    """
    store = store if isinstance(store, Store) else open_store(store)
    found: list[Snapshot] = []
    profiles: set[str] = set()
    stored = store.stored("weights")
    for version in reversed([version for version in store.versions() if version >= since]):
        manifest = store.readable(version)
        if manifest is None:
            continue
        profiles |= manifest.variants.keys()
        if profile is not None:
            if profile not in manifest.variants:
                continue
            manifest = manifest.of_variant(profile)
        is_average = manifest.ema.schedule != "none"
        is_before = not found or manifest.ema.updates < found[-1].updates
        if is_average and is_before and manifest.weights.digest in stored:
            found.append(_published(manifest, partial(_read, store, manifest.weights)))
    if not found:
        of = "a ModelEMA" if profile is None else f"a ModelEMA with the profile {profile!r}"
        there = f"; its profiles: {', '.join(sorted(profiles)) or 'none'}" if profile is not None else ""
        raise EmaError(f"expected versions published from {of}, but {store.location} has none{there}")
    return found[::-1]


def _published(manifest: Manifest, tensors: Callable[[], State]) -> Snapshot:
    """The snapshot that a manifest describes."""
    facts = set(EmaInfo.model_fields) - {"schedule", "decay"}
    described = manifest.ema.model_dump(exclude=facts, exclude_none=True)
    update_every = int(described.pop("update_every", 1))
    try:
        schedule = from_description(described)
    except EmaError as error:
        raise EmaError(f"version {manifest.version}: {error}") from None
    return Snapshot(schedule, manifest.ema.updates, tensors, update_every)


def _read(store: Store, blob: Blob) -> State:
    return store.tensors("weights", blob).tensors
