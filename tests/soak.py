"""Counts of a thousand and more: `make soak` runs them whole and keeps their figures, other targets run a twentieth."""

import json
import os
from datetime import UTC, datetime

from tests.programs import ROOT

WHOLE = bool(os.environ.get("SOAK"))
RESULTS = ROOT / "benchmarks" / "results" / "soak.json"


def times(count: int) -> int:
    """Return how often a test does what it would do `count` times in `make soak`."""
    return count if WHOLE else count // 20


def record(what: str, **figures: float) -> None:
    """Print what came of a test, and keep it where the counts are whole."""
    print(f"{what}: {', '.join(f'{number} {name}' for name, number in figures.items())}")
    if WHOLE:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        kept[what] = {"date": datetime.now(UTC).date().isoformat(), **figures}
        RESULTS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
