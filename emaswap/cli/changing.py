"""Changing what is served and kept: `pin`, `unpin`, `prune`."""

from typing import Annotated

import typer

from emaswap.cli.options import Location, Number
from emaswap.cli.output import console
from emaswap.store import open_store
from emaswap.store.retention import Retention


def pin(
    store: Location, version: Number, reason: Annotated[str, typer.Option(help="Why, for whoever finds it.")] = ""
) -> None:
    """Have every service of this store serve this version until it is unpinned."""
    open_store(store).orders.set_pin(version, reason)
    console.print(f"pinned version {version}")


def unpin(store: Location) -> None:
    """Have every service of this store serve the newest version again."""
    open_store(store).orders.clear_pin()
    console.print("unpinned")


def prune(
    store: Location,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest versions to keep.")] = 10,
    grace: Annotated[float, typer.Option(min=0, help="Keep every version younger than this, in seconds.")] = 60.0,
) -> None:
    """Delete old versions, except the pinned one, and files that no version names."""
    retention = Retention(open_store(store), keep=keep, grace_s=grace)
    pruned, orphans = retention.prune(), retention.clean()
    console.print(f"pruned {len(pruned)} versions and {len(orphans)} files that no version names")
