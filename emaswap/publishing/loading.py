"""Loading: a published version as a module again, proven like in a service, for use without one."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from emaswap.errors import BadVersion, Missing, Unreadable
from emaswap.store import Store, open_store
from emaswap.store.line import Line
from emaswap.versions import proof
from emaswap.versions.architecture import TRUSTED_BY_DEFAULT

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
    look, line = found.seen(), Line(found)

    def proven(number: int) -> nn.Module:
        whole = found.manifest(number)
        line.check(whole, look)
        manifest = whole.of_variant(variant)
        fetched = found.fetch(manifest)
        module = proof.verify(manifest, fetched, trusted=trusts, device=torch.device(device))
        proof.replay(manifest, fetched.probe, module, device=torch.device(device))
        return module

    if version is not None:
        return proven(version)
    newest_failed: BadVersion | Unreadable | None = None
    for number in reversed(look.in_line):
        try:
            return proven(number)
        except Missing:
            continue  # pruned meanwhile
        except (BadVersion, Unreadable) as error:
            log.warning("version %d in %s is passed over: %s", number, found.location, error)
            newest_failed = newest_failed or error
    raise newest_failed or Missing(f"there is no version in {found.location}")
