"""Accuracy curves of raw and averaged weights over the steps of a run, and a summary of several runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Curve:
    """The accuracies of one run at each of `steps`, of its raw and its averaged weights."""

    seed: int
    steps: tuple[int, ...]
    raw: tuple[float, ...]
    ema: tuple[float, ...]

    def half(self, *, second: bool) -> "Curve":
        """Return the evaluations of the first or the second half of the steps; the second half is never empty."""
        at = [index for index, step in enumerate(self.steps) if (2 * step > self.steps[-1]) is second]
        return Curve(
            self.seed,
            tuple(self.steps[index] for index in at),
            tuple(self.raw[index] for index in at),
            tuple(self.ema[index] for index in at),
        )

    @property
    def gain(self) -> float:
        """How much better the averaged weights are, on average over all evaluations."""
        return fmean(self.ema) - fmean(self.raw)


COLUMNS = (
    "seed",
    "raw, mean",
    "EMA, mean",
    "EMA − raw",
    "raw, lowest",
    "EMA, lowest",
    "raw, last",
    "EMA, last",
    "EMA better, equal, worse",
)


def table(curves: Sequence[Curve]) -> list[tuple[str, ...]]:
    """Return a row of `COLUMNS` for each run, and one with the mean ± standard deviation over the runs."""
    figures = [
        (fmean(it.raw), fmean(it.ema), it.gain, min(it.raw), min(it.ema), it.raw[-1], it.ema[-1]) for it in curves
    ]
    formats = [".4f", ".4f", "+.4f", ".4f", ".4f", ".4f", ".4f"]
    rows = [
        (str(it.seed), *map(format, line, formats), _counts([it])) for it, line in zip(curves, figures, strict=True)
    ]
    if len(curves) > 1:
        over_seeds = (
            f"{fmean(column):{spec}} ± {stdev(column):.4f}"
            for column, spec in zip(zip(*figures, strict=True), formats, strict=True)
        )
        rows.append(("all", *over_seeds, _counts(curves)))
    return rows


def reading(curves: Sequence[Curve]) -> str:
    """Return what the curves say in words, however they turn out."""
    early, late = ([curve.half(second=second) for curve in curves] for second in (False, True))
    better = sum(curve.gain > 0 for curve in late)
    steadier = sum(min(curve.ema) > min(curve.raw) for curve in late)
    first, last = late[0].steps[0], late[0].steps[-1]
    before = f" In the first half it was {_in_words(early)}." if early[0].steps else ""
    return (
        f"In the noisy phase, from step {first} to {last}, the EMA was {_in_words(late)}. Its mean over that phase was "
        f"better for {better} of {len(late)} seeds, and its worst evaluation was better than the worst one of the raw "
        f"weights for {steadier}.{before}"
    )


def _in_words(curves: Sequence[Curve]) -> str:
    better, equal, worse = _compared(curves)
    total = better + equal + worse
    return f"better than the raw weights in {better} of {total} evaluations, equal in {equal} and worse in {worse}"


def _counts(curves: Sequence[Curve]) -> str:
    return ", ".join(map(str, _compared(curves)))


def _compared(curves: Sequence[Curve]) -> tuple[int, int, int]:
    """Count the evaluations in which the averaged weights were better, equal, and worse."""
    pairs = [pair for curve in curves for pair in zip(curve.ema, curve.raw, strict=True)]
    return sum(e > r for e, r in pairs), sum(e == r for e, r in pairs), sum(e < r for e, r in pairs)
