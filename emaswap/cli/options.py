"""What several verbs of the command take."""

from typing import Annotated

import typer

Location = Annotated[str, typer.Option("--store", envvar="EMASWAP_STORE", help="The store's directory.")]
Number = Annotated[int, typer.Argument(min=1, max=10**15, help="The version's number.")]
