"""`emaswap`: look into a store, and pin, unpin and prune what is in it. One module a group of verbs."""

import sys
from typing import Annotated

import typer

from emaswap.cli import changing, looking
from emaswap.cli.output import console, printable
from emaswap.errors import EmaswapError
from emaswap.release import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for verb in (looking.ls, looking.show, looking.verify, changing.pin, changing.unpin, changing.prune):
    app.command()(verb)


def main() -> None:
    """Run the command; errors that are ours end it with one line and status 1."""
    try:
        app()
    except EmaswapError as error:
        print(f"emaswap: {printable(str(error))}", file=sys.stderr)
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
