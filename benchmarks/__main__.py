"""`make bench`: runs every benchmark, and ends with the list of bars that do not hold."""

import sys

import torch

from benchmarks import ema, freshness, gpu, memory, publish, serve, swap
from benchmarks.report import Row, report

BENCHMARKS = {
    "ema": ema.measure,
    "publish": publish.measure,
    "freshness": freshness.measure,
    "serve": serve.measure,
    "swap": swap.measure,
    "memory": memory.measure,
    "gpu": gpu.measure,
}


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all; 1 when a bar does not hold."""
    missed: list[tuple[str, Row]] = []
    here = [name for name in BENCHMARKS if name != "gpu" or torch.cuda.is_available()]
    for name in names or here:
        rows = BENCHMARKS[name]()
        report(name, rows)
        missed += [(name, row) for row in rows if not row.holds]
    for name, row in missed:
        print(f"does not hold: {name}: {row.measure}: {row.ratio:.3g}, the bar is {row.bar}")
    print("every bar holds" if not missed else f"{len(missed)} bars do not hold")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
