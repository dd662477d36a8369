"""What the command prints: no terminal obeys what a store holds, and no table is squeezed."""

import json

from rich.console import Console
from rich.text import Text

# A table is not squeezed into a narrow terminal, nor into the 80 columns of a pipe: lines may wrap.
console = Console(highlight=False, width=max(160, Console().width))


def printable(text: str) -> str:
    """Return a text whose characters no terminal obeys: what a store holds may have been written to be printed."""
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def plain(text: str) -> Text:
    """Return a text that is shown as it is, whatever it would mean as markup or to a terminal."""
    return Text(printable(text))


def duration(seconds: float) -> str:
    """Return seconds in the unit that people would say them in."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
