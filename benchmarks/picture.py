"""A picture of latency over time, with the swaps marked."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.open_loop import Answers

_WINDOW_S = 0.2


def draw(without: Answers, swapping: Answers, path: Path) -> None:
    """Draw median, 99th percentile and longest of each fifth of a second: without swaps above, and with them below."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, sharey=True)
    for axes, answers, title in (
        (above, without, "no swap"),
        (below, swapping, "100 MB of new weights every second; a line where a version answered first"),
    ):
        due, latency = np.array(answers.due_s), np.array(answers.latency_s) * 1e3
        window = (due / _WINDOW_S).astype(int)
        groups = [latency[window == each] for each in np.unique(window)]
        times = np.unique(window) * _WINDOW_S
        for name, percent, colour in (("longest", 100, "#bbbbbb"), ("99 %", 99, "#d9822b"), ("median", 50, "#2b6cb0")):
            axes.plot(
                times, [np.percentile(group, percent) for group in groups], label=name, color=colour, linewidth=1.2
            )
        for moment in first_answers(answers)[1:]:
            axes.axvline(moment, color="#2f855a", linewidth=0.6, linestyle=":")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylabel("latency, ms")
        axes.grid(visible=True, alpha=0.2)
    above.set_ylim(bottom=0)  # of both, once both are drawn
    above.legend(fontsize=8, loc="upper right", ncols=3)
    below.set_xlabel("seconds")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def first_answers(answers: Answers) -> list[float]:
    """Return when each version answered first."""
    first: dict[int, float] = {}
    for due, version in zip(answers.due_s, answers.version, strict=True):
        first[version] = min(first.get(version, due), due)
    return sorted(first.values())
