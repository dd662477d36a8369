"""Plots of accuracy over optimizer steps. Imports matplotlib only when it draws, and opens no window."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from emaswap.files.durable import written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RAW, _EMA = "tab:orange", "tab:blue"


def plot_accuracy(path: Path, steps: Sequence[int], raw: Sequence[float], ema: Sequence[float]) -> None:
    """Plot one run to a PNG file: the accuracy of the raw and the averaged weights at each of `steps`."""
    with _axes(path, "Accuracy on held-out data, one run") as axes:
        marker = "." if len(steps) < 100 else ""
        axes.plot(steps, raw, color=_RAW, linewidth=1, marker=marker, label="raw weights")
        axes.plot(steps, ema, color=_EMA, linewidth=2, marker=marker, label="EMA weights")
        _look_at(axes, [raw, ema])


def plot_bands(
    path: Path, title: str, steps: Sequence[int], raw: Sequence[Sequence[float]], ema: Sequence[Sequence[float]]
) -> None:
    """Plot several runs, (runs, steps) each, to a PNG file: their mean, and the band from lowest to highest."""
    with _axes(path, title) as axes:
        for label, runs, color in (("raw weights", raw, _RAW), ("EMA weights", ema, _EMA)):
            curves = np.array(runs)
            axes.fill_between(steps, curves.min(0), curves.max(0), color=color, alpha=0.25, linewidth=0)
            axes.plot(steps, curves.mean(0), color=color, linewidth=2, label=f"{label}: mean, lowest to highest")
        _look_at(axes, [*raw, *ema])


@contextmanager
def _axes(path: Path, title: str) -> Iterator["Axes"]:
    """Yield axes to draw on, and write the file at the end."""
    # A figure made without pyplot draws with Agg, shares no global state, and needs no display.
    from matplotlib.figure import Figure  # noqa: PLC0415  (importing it takes half a second)

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    yield axes
    axes.set(title=title, xlabel="optimizer steps", ylabel="accuracy")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with written(path.parent, lambda file: figure.savefig(file, format="png", dpi=120)) as (part, _):
        part.replace(path)


def _look_at(axes: "Axes", curves: Sequence[Sequence[float]]) -> None:
    """Limit the axis to the range of the curves after their steep beginning."""
    late = np.array([curve[len(curve) // 10 :] for curve in curves])
    if not np.isfinite(late).any():
        return
    low, high = float(np.nanmin(late)), float(np.nanmax(late))
    margin = max(0.1 * (high - low), 0.002)
    axes.set_ylim(low - margin, min(high + margin, 1.0 + margin / 4))
