"""Loading: a published version as a module again, proven like in a service, for use without one."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from emaswap.errors import BadVersion, Missing, Reason
from emaswap.store import Store, open_store
from emaswap.versions import proof
from emaswap.versions.architecture import TRUSTED_BY_DEFAULT
from emaswap.versions.manifest import Manifest

log = logging.getLogger(__name__)


def load(
    store: Store | str | Path,
    version: int | None = None,
    *,
    trusted: str | Iterable[str] = (),
    variant: str | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Return a published version as a module in eval mode, proven as a service proves it.

    Args:
        store: a store, or the path of one.
        version: its number; by default the newest one that can be proven. Pins are not looked at.
        trusted: factories to build from besides those of `emaswap.models`: "package.module:factory" or "package.*".
        variant: the name of a further average to load instead of the main one.
        device: where the module computes.

    Raises:
        Missing: there is no such version, or none at all.
        BadVersion: the version, or the newest of several that are all bad, is not what it claims to be.
        StoreError: the store could not be read just now.
    """
    found = store if isinstance(store, Store) else open_store(store)
    trusts = (*TRUSTED_BY_DEFAULT, *([trusted] if isinstance(trusted, str) else trusted))
    if version is not None:
        return _proven(found, version, trusts, variant, torch.device(device))
    newest_is_bad: BadVersion | None = None
    for number in reversed(found.versions()):
        try:
            return _proven(found, number, trusts, variant, torch.device(device))
        except Missing:
            continue  # pruned meanwhile
        except BadVersion as error:
            log.warning("version %d in %s is passed over: %s", number, found.location, error)
            newest_is_bad = newest_is_bad or error
    raise newest_is_bad or Missing(f"there is no version in {found.location}")


def _proven(
    store: Store, version: int, trusted: tuple[str, ...], variant: str | None, device: torch.device
) -> nn.Module:
    whole = store.manifest(version)
    _check_term(store, whole)
    manifest = whole.of_variant(variant)
    fetched = proof.fetch(store, manifest)
    module = proof.verify(manifest, fetched, trusted=trusted, device=device)
    proof.replay(manifest, fetched, module, device=device)
    return module


def _check_term(store: Store, manifest: Manifest) -> None:
    """Raise `BadVersion` for a version behind one of a higher term: its publisher had been replaced."""
    for version in reversed(store.versions()):
        if version < manifest.version:
            try:
                before = store.manifest(version).term
            except (BadVersion, Missing):
                continue
            if before > manifest.term:
                raise BadVersion(Reason.STALE_TERM, f"term {manifest.term} is below term {before} of version {version}")
            return
