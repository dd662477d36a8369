"""Results of a benchmark: a table to read, and JSON to keep."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from emaswap import __version__

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One measure beside the floor that was measured in the same run.

    `bar` bounds the ratio from above, or from below where it is to be `at_least` that. `spread` has the least and the greatest ratio where several runs were made.
    """

    measure: str
    value: float
    unit: str
    floor: float | None = None
    bar: float | None = None
    spread: tuple[float, float] | None = None
    at_least: bool = False

    @property
    def ratio(self) -> float | None:
        """How many times the floor."""
        return None if self.floor is None else self.value / self.floor

    @property
    def holds(self) -> bool:
        """Whether the ratio is on the right side of the bar; true where there is none."""
        if self.bar is None or self.ratio is None:
            return True
        return self.ratio >= self.bar if self.at_least else self.ratio <= self.bar


def over(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Return, for each measure, the row of the run with the median ratio, and the spread over all runs."""
    rows: list[Row] = []
    for same in zip(*runs, strict=True):
        ranked = sorted(same, key=lambda row: row.ratio or 0.0)
        least, greatest = ranked[0].ratio or 0.0, ranked[-1].ratio or 0.0
        rows.append(replace(ranked[len(ranked) // 2], spread=(least, greatest)))
    return rows


def report(name: str, rows: list[Row]) -> None:
    """Print the table, and write benchmarks/results/<name>.json."""
    table = Table("measure", "value", "floor", "ratio", "spread", "bar", "holds", title=name, title_justify="left")
    for row in rows:
        floor, ratio, bar = (
            f"{number:.4g}" if number is not None else "" for number in (row.floor, row.ratio, row.bar)
        )
        bar = f"{'≥' if row.at_least else '≤'} {bar}" if bar else ""
        spread = "–".join(f"{number:.3g}" for number in row.spread or ())
        holds = "" if row.bar is None else "yes" if row.holds else "NO"
        table.add_row(row.measure, f"{row.value:.4g} {row.unit}", floor, ratio, spread, bar, holds)
    Console(width=max(Console().width, 130)).print(table)
    RESULTS.mkdir(exist_ok=True)
    kept = {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "emaswap": __version__,
        },
        "rows": [asdict(row) | {"ratio": row.ratio, "holds": row.holds} for row in rows],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
