"""The averages that were published to a store, as snapshots that an average can be synthesised from."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from emaswap.averaging.schedule import from_description
from emaswap.averaging.synthesis import Snapshot, State
from emaswap.errors import EmaError
from emaswap.files.tensor_file import Blob
from emaswap.store import Store, open_store
from emaswap.versions.manifest import Manifest, ScheduleInfo


def snapshots_of(store: Store | str | Path, *, variant: str | None = None, since: int = 1) -> list[Snapshot]:
    """Return the published averages of a store, oldest first; their weights are read when they are combined.

    Args:
        store: a store, or the location of one.
        variant: the published variant to take, instead of the average itself.
        since: the first version to take: with a store that has seen several training runs, that of the last one.

    Versions that were pruned or cannot be read are passed over; so are those that a resumed training went back before.
    Raises `EmaError` when there is none, or when one's schedule is of a class of your own.
    """
    store = store if isinstance(store, Store) else open_store(store)
    found: list[Snapshot] = []
    variants: set[str] = set()
    stored = store.stored("weights")
    for version in reversed([version for version in store.versions() if version >= since]):
        manifest = store.readable(version)
        if manifest is None:
            continue
        variants |= manifest.variants.keys()
        if variant is not None:
            if variant not in manifest.variants:
                continue
            manifest = manifest.of_variant(variant)
        schedule = manifest.ema.schedule
        is_before = not found or manifest.ema.updates < found[-1].updates
        if schedule is not None and is_before and manifest.weights.digest in stored:
            found.append(_published(manifest, schedule, partial(_read, store, manifest.weights)))
    if not found:
        of = "a ModelEMA" if variant is None else f"a ModelEMA with the variant {variant!r}"
        there = f"; its variants: {', '.join(sorted(variants)) or 'none'}" if variant is not None else ""
        raise EmaError(f"expected versions published from {of}, but {store.location} has none{there}")
    return found[::-1]


def _published(manifest: Manifest, schedule: ScheduleInfo, tensors: Callable[[], State]) -> Snapshot:
    """Return the snapshot that a manifest describes."""
    try:
        made = from_description(schedule.model_dump())
    except EmaError as error:
        raise EmaError(f"version {manifest.version}: {error}") from None
    return Snapshot(made, manifest.ema.updates, tensors, manifest.ema.update_every)


def _read(store: Store, blob: Blob) -> State:
    return store.tensors("weights", blob).tensors
