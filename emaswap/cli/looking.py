"""Looking into a store: `ls`, `show`, `verify`."""

import sys
from datetime import UTC, datetime
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from emaswap.cli.options import Location, Number
from emaswap.cli.output import console, duration, plain, printable
from emaswap.errors import BadVersion, Missing, Short, StoreError, Unreadable
from emaswap.store import Store, open_store
from emaswap.store.line import Line
from emaswap.store.look import Look
from emaswap.versions import proof
from emaswap.versions.architecture import TRUSTED_BY_DEFAULT
from emaswap.versions.manifest import Manifest


def ls(store: Location) -> None:
    """List the versions in a store, the newest last."""
    found = open_store(store)
    look, pin, no_pin = found.seen(), None, None
    try:
        pin = found.orders.pin()
    except StoreError as error:
        no_pin = error
    stored = found.stored("weights")
    table = Table(box=None, pad_edge=False)
    for heading in ("version", "term", "step", "published", "MB", "digest", "EMA metrics", ""):
        numeric = heading in ("version", "term", "step", "MB")
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for version in look.numbers:
        try:
            manifest = found.manifest(version)
        except (BadVersion, Missing, Unreadable) as error:
            table.add_row(str(version), *[""] * 6, plain(f"cannot be read: {error}"))
            continue
        notes = "pinned" if pin and pin.names(manifest.identity) else ""
        if manifest.weights.digest not in stored:
            notes = f"{notes} weights pruned".strip()
        table.add_row(*_row(manifest), notes)
    console.print(table)
    if pin and look.get(pin.version) is None:
        console.print(f"version {pin.version} is pinned, and is not in the store")
    elif pin and (there := found.readable(pin.version)) and not pin.names(there.identity):
        console.print(f"another version {pin.version} is pinned than the one that has its number now")
    if no_pin:
        raise no_pin


def show(store: Location, version: Number) -> None:
    """Print a version's manifest."""
    lines = open_store(store).manifest(version).encode().decode().splitlines()
    sys.stdout.writelines(f"{printable(line)}\n" for line in lines)


def verify(
    store: Location,
    versions: Annotated[list[int] | None, typer.Argument(help="Versions to verify; all of them by default.")] = None,
    trust: Annotated[
        list[str] | None, typer.Option(help="Factory to trust besides those of emaswap.models; may be repeated.")
    ] = None,
) -> None:
    """Prove versions right as a service would: terms, digests, schema, finite values, and the replayed probe."""
    found = open_store(store)
    look, line = found.seen(), Line(found)
    trusted = (*TRUSTED_BY_DEFAULT, *(trust or ()))
    problems = []
    for version in track(versions or look.numbers, "verifying", console=Console(stderr=True), transient=True):
        if _is_pruned(found, version, look):
            console.print(f"version {version}: weights pruned; what is left of it opens its term")
            continue
        problem = _problem(found, version, look, line, trusted)
        console.print(plain(f"version {version}: {problem or 'right'}"), soft_wrap=True)
        problems += [problem] if problem else []
    if problems:
        raise typer.Exit(1)


def _row(manifest: Manifest) -> list[str | Text]:
    metrics = [
        f"{name.removeprefix('ema_')} {value:.4g}"
        for name, value in manifest.training.metrics.items()
        if value is not None and name.startswith("ema_")
    ]
    return [
        str(manifest.version),
        str(manifest.term),
        str(manifest.training.step),
        f"{duration(manifest.age_s(datetime.now(UTC)))} ago",
        f"{manifest.weights.size / 1e6:.1f}",
        manifest.weights.digest[:19],
        plain(", ".join(metrics)),
    ]


def _is_pruned(store: Store, version: int, look: Look) -> bool:
    """Return whether retention has left nothing but the manifest of a version, which stays because it opens a term."""
    manifest = store.readable(version)
    if manifest is None or version >= look.newest or None not in store.stamps(version).values():
        return False
    earlier = [number for number in look.numbers if number < version]
    before = store.readable(earlier[-1]) if earlier else None
    return before is None or before.term < manifest.term


def _problem(store: Store, version: int, look: Look, line: Line, trusted: tuple[str, ...]) -> str:
    """Return what is wrong with a version; empty when nothing is."""
    device = torch.device("cpu")
    try:
        whole = store.manifest(version)
        line.check(whole, look)
        for manifest in (whole, *map(whole.of_variant, whole.variants)):
            fetched = store.fetch(manifest)
            module = proof.verify(manifest, fetched, trusted=trusted, device=device)
            proof.replay(manifest, fetched.probe, module, device=device)
    except (BadVersion, Missing, Short, Unreadable) as error:
        return str(error)
    return ""
