"""`emaswap`: look into a store, and pin, unpin and prune what is in it."""

import json
import sys
from datetime import UTC, datetime
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from emaswap.errors import BadVersion, EmaswapError, Missing, Unreadable
from emaswap.release import __version__
from emaswap.store import Store, open_store
from emaswap.store.line import Line
from emaswap.store.look import Look
from emaswap.store.retention import Retention
from emaswap.versions import proof
from emaswap.versions.architecture import TRUSTED_BY_DEFAULT
from emaswap.versions.manifest import Manifest

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
# A table is not squeezed into a narrow terminal, nor into the 80 columns of a pipe: lines may wrap.
console = Console(highlight=False, width=max(160, Console().width))

Location = Annotated[str, typer.Option("--store", envvar="EMASWAP_STORE", help="The store's directory.")]
Number = Annotated[int, typer.Argument(min=1, help="The version's number.")]


def main() -> None:
    """Run the command; errors that are ours end it with one line and status 1."""
    try:
        app()
    except EmaswapError as error:
        print(f"emaswap: {_printable(str(error))}", file=sys.stderr)
        sys.exit(1)


def _print_release(wanted: bool) -> None:  # noqa: FBT001  (typer calls it with the flag)
    if wanted:
        console.print(__version__)
        raise typer.Exit


@app.callback()
def emaswap(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_release, is_eager=True, help="Print the release and exit.")
    ] = False,
) -> None:
    """Look into a store; pin, unpin and prune what is in it."""


@app.command()
def ls(store: Location) -> None:
    """List the versions in a store, the newest last."""
    found = open_store(store)
    look = found.look()
    stored = found.stored("weights")
    table = Table(box=None, pad_edge=False)
    for heading in ("version", "term", "step", "published", "MB", "digest", "EMA metrics", ""):
        numeric = heading in ("version", "term", "step", "MB")
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for version in look.numbers:
        notes = "pinned" if (pin := look.pin) and pin.version == version else ""
        try:
            manifest = found.manifest(version)
        except (BadVersion, Missing, Unreadable) as error:
            table.add_row(str(version), *[""] * 6, _plain(f"cannot be read: {error}"))
            continue
        if manifest.weights.digest not in stored:
            notes = f"{notes} weights pruned".strip()
        table.add_row(*_row(manifest), notes)
    console.print(table)


@app.command()
def show(store: Location, version: Number) -> None:
    """Print a version's manifest."""
    lines = open_store(store).manifest(version).encode().decode().splitlines()
    sys.stdout.writelines(f"{_printable(line)}\n" for line in lines)


@app.command()
def verify(
    store: Location,
    versions: Annotated[list[int] | None, typer.Argument(help="Versions to verify; all of them by default.")] = None,
    trust: Annotated[
        list[str] | None, typer.Option(help="Factory to trust besides those of emaswap.models; may be repeated.")
    ] = None,
) -> None:
    """Prove versions right as a service would: terms, digests, schema, finite values, and the replayed probe."""
    found = open_store(store)
    look, line = found.look(), Line(found)
    trusted = (*TRUSTED_BY_DEFAULT, *(trust or ()))
    problems = []
    for version in track(versions or look.numbers, "verifying", console=Console(stderr=True), transient=True):
        problem = _problem(found, version, look, line, trusted)
        console.print(_plain(f"version {version}: {problem or 'right'}"), soft_wrap=True)
        problems += [problem] if problem else []
    if problems:
        raise typer.Exit(1)


@app.command()
def pin(
    store: Location, version: Number, reason: Annotated[str, typer.Option(help="Why, for whoever finds it.")] = ""
) -> None:
    """Have every service of this store serve this version until it is unpinned."""
    open_store(store).orders.set_pin(version, reason)
    console.print(f"pinned version {version}")


@app.command()
def unpin(store: Location) -> None:
    """Have every service of this store serve the newest version again."""
    open_store(store).orders.clear_pin()
    console.print("unpinned")


@app.command()
def prune(
    store: Location,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest versions to keep.")] = 10,
    grace: Annotated[float, typer.Option(min=0, help="Keep every version younger than this, in seconds.")] = 60.0,
) -> None:
    """Delete old versions, except the pinned one, and files that no version names."""
    retention = Retention(open_store(store), keep=keep, grace_s=grace)
    pruned, orphans = retention.prune(), retention.clean()
    console.print(f"pruned {len(pruned)} versions and {len(orphans)} files that no version names")


def _printable(text: str) -> str:
    """Return a text whose characters no terminal obeys: what a store holds may have been written to be printed."""
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def _plain(text: str) -> Text:
    """Return a text that is shown as it is, whatever it would mean as markup or to a terminal."""
    return Text(_printable(text))


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
        f"{_duration(manifest.age_s(datetime.now(UTC)))} ago",
        f"{manifest.weights.size / 1e6:.1f}",
        manifest.weights.digest[:19],
        _plain(", ".join(metrics)),
    ]


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


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
    except (BadVersion, Missing, Unreadable) as error:
        return str(error)
    return ""
