"""Post-hoc synthesis: an average that was not tracked, from snapshots of those that were.

Every average is a weighted sum of the weights that training passed through, and a schedule says with which weights:
its profile. What combines the snapshots' profiles into the target's also combines the snapshots into the target. The
idea is that of EDM2 (arXiv 2312.02696, section 3), here for any schedules and intervals, with their exact profiles.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from emaswap.averaging.averaged_module import as_names
from emaswap.averaging.held import why_not_averaged
from emaswap.averaging.model_ema import ModelEMA
from emaswap.averaging.schedule import Schedule, as_schedule, is_number, span_decay
from emaswap.errors import EmaError
from emaswap.tensors import differences, in_words, plain_name

Array = npt.NDArray[np.float64]
State = Mapping[str, Tensor]

_ROWS = 1 << 15
# Profiles that differ by less than float32 can tell are one: what told them apart would be rounding, much enlarged.
_RANK = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """An average as it was after so many updates, counted from the first of training.

    Args:
        schedule: its schedule.
        updates: the updates that it had seen.
        tensors: its state by name, which must not change any more; or a function that reads it when it is needed.
        update_every: the interval of the updates that it took in.
    """

    schedule: Schedule
    updates: int
    tensors: State | Callable[[], State]
    update_every: int = 1

    @classmethod
    def of(cls, ema: ModelEMA, variant: str | None = None) -> Self:
        """Return a copy on the CPU of an average, or of one of its variants, as it is now."""
        if not isinstance(ema, ModelEMA):
            raise EmaError(f"a snapshot is of a ModelEMA, got {type(ema).__name__}")
        if variant is None and ema.decay_since:
            raise EmaError(
                f"the decay was set to {ema.decay!r} after {ema.decay_since} updates, so that it is not that of all: make "
                "Snapshot(schedule, updates, tensors) with a function that gives the decay of each update"
            )
        if variant is not None and variant not in ema.variants:
            raise EmaError(f"no variant {variant!r}: there are {', '.join(ema.variants) or 'none'}")
        module, schedule = (ema.ema, ema.decay) if variant is None else (ema.variants[variant], ema.schedules[variant])
        tensors = {
            plain_name(name): tensor.detach().to("cpu", copy=True) for name, tensor in module.state_dict().items()
        }
        return cls(schedule, ema.updates, tensors, ema.update_every)


@dataclass(frozen=True)
class Coefficients:
    """How much each snapshot counts; they sum to 1. `error` is ‖combined profile − target's‖ / ‖target's‖."""

    values: tuple[float, ...]
    error: float


def profile_weights(schedule: Schedule, updates: int, *, update_every: int = 1) -> Array:
    """Return how much each update counts in the average after `updates` of them: (updates + 1,), float64, sum 1.

    Entry i is that of update i, (1−βᵢ)·βᵢ₊₁·…·βₙ; entry 0 is that of the weights the average started at. Updates that
    `update_every` passes over count 0.
    """
    _check(updates, update_every)
    schedule = _checked(schedule, "what has a profile")
    parts = [(rows @ mix)[:, 0] for rows, mix in _profiles([(schedule, updates)], update_every)]
    profile = np.zeros(updates + 1)
    profile[::update_every] = np.concatenate(parts[::-1])
    return profile


def coefficients(snapshots: Sequence[Snapshot], target: Schedule, updates: int | None = None) -> Coefficients:
    """Return the combination of the snapshots that is nearest to the target's profile after `updates`, by least squares.

    By default the target is to be as of the newest snapshot; it has the snapshots' interval. Memory does not grow with
    the number of updates. Raises `EmaError` without snapshots, for several intervals, or for a target later than all.
    """
    target = _checked(target, "the target")
    updates, update_every = _asked(snapshots, updates)
    columns = [*((snapshot.schedule, snapshot.updates) for snapshot in snapshots), (target, updates)]
    # QR of the stacked parts, each reduced together with the triangle of those before it. The normal equations would
    # square the condition number, and lose half of the digits.
    triangle = np.zeros((0, len(columns)))
    for rows, mix in _profiles(columns, update_every):
        triangle = _triangle(np.concatenate([triangle, _triangle(rows) @ mix]))
    tracked, wanted = triangle[:, :-1], triangle[:, -1]

    # That the sum is 1 is eliminated: values = even + free·solution, where the columns of `free` span all that sums to
    # 0. A row added for it instead would hold only as well as it is weighted, and its weight spoil the conditioning.
    count = len(snapshots)
    even = np.full(count, 1 / count)
    free = np.linalg.qr(np.ones((count, 1)), mode="complete")[0][:, 1:]
    left, sizes, right = np.linalg.svd(tracked @ free, full_matrices=False)
    kept = sizes > _RANK * np.linalg.norm(tracked)
    solution = right[kept].T @ (left[:, kept].T @ (wanted - tracked @ even) / sizes[kept])
    values = even + free @ solution
    error = np.linalg.norm(tracked @ values - wanted) / np.linalg.norm(wanted)
    return Coefficients(tuple(values.tolist()), float(error))


def synthesize(
    snapshots: Sequence[Snapshot],
    target: Schedule,
    updates: int | None = None,
    *,
    exclude: Iterable[str] = (),
    max_error: float = 0.05,
) -> dict[str, Tensor]:
    """Return the state of the average that the target schedule would have given, in the snapshots' dtypes.

    Args:
        snapshots: of one training run, with one or several schedules; their states are read one after the other.
        target: the schedule of the average that is wanted.
        updates: after how many updates; by default as many as the newest snapshot has seen.
        exclude: names that were copied instead of averaged, with wildcards: "*.running_*". They, and integers, come
            from the newest snapshot up to `updates`.
        max_error: the largest error of the coefficients to accept. In trials the result was nearer to the tracked
            average than that share of the average's distance to the raw weights.

    Raises:
        EmaError: no snapshot, states of other names, shapes or dtypes, a target later than all snapshots, or too large
            an error: then more snapshots are needed, or schedules nearer to the target's.
    """
    exclude = as_names(exclude, "exclude")
    if not is_number(max_error):
        raise EmaError(f"max_error is a number, as 0.05, got {max_error!r}")
    if isinstance(snapshots, Iterable):  # which may be used up by being read once
        snapshots = list(snapshots)
    target = _checked(target, "the target")
    found = coefficients(snapshots, target, updates)
    if not found.error <= max_error:
        raise EmaError(
            f"{len(snapshots)} snapshots give the profile of {target.describe()} with an error of {found.error:.3g}, "
            f"expected at most {max_error:g}: take snapshots more often, track a second average on the target's other "
            "side, or accept it with max_error"
        )
    updates, _ = _asked(snapshots, updates)
    newest = min(snapshots, key=lambda each: (each.updates > updates, abs(each.updates - updates)))
    total = _Sum(newest, exclude)
    for snapshot, value in zip(snapshots, found.values, strict=True):
        total.add(snapshot, value)
    return total.state()


def _profiles(columns: Sequence[tuple[Schedule, int]], update_every: int) -> Iterator[tuple[Array, Array]]:
    """Profiles side by side, a column each, in parts from the last update that is taken in to the first, then the start.

    A part is the product of two factors: the rows for each schedule alone, in order, and what later updates leave of
    them in each column. Going backwards, that is a running product, in which a decay of 0 is a number like any other,
    and what has been forgotten is 0.
    """
    schedules: list[Schedule] = []
    for schedule, _ in columns:
        if schedule not in schedules:
            schedules.append(schedule)
    kinds = np.array([schedules.index(schedule) for schedule, _ in columns])
    counts = np.array([updates // update_every for _, updates in columns])
    left = np.ones(len(columns))
    last = int(counts.max())
    while last:
        # No part goes beyond the end of a column: each then has all of the part's rows, or none.
        before = max(last - _ROWS, int(max(counts[counts < last], default=0)))
        decays = np.stack([_decays(schedule, before, last, update_every) for schedule in schedules], axis=1)
        remains = np.cumprod(np.vstack([np.ones(len(schedules)), decays[::-1]]), axis=0)[::-1]
        present = counts >= last
        yield (1 - decays) * remains[1:], np.where(np.arange(len(schedules))[:, None] == kinds, left * present, 0)
        left = np.where(present, left * remains[0, kinds], left)
        last = before
    yield np.ones((1, 1)), left[None]


def _triangle(rows: Array) -> Array:
    """R of the QR factorisation. By torch, whose threads the user sets; numpy's take all cores for small matrices."""
    triangle: Array = torch.linalg.qr(torch.from_numpy(rows), mode="r").R.numpy()
    return triangle


def _decays(schedule: Schedule, before: int, last: int, update_every: int) -> Array:
    """Return the decays of the intervals after `before` up to `last`, as `ModelEMA` applies them."""
    ends = range((before + 1) * update_every, last * update_every + 1, update_every)
    return np.fromiter((span_decay(schedule, end - update_every + 1, end) for end in ends), np.float64, last - before)


def _checked(schedule: object, what: str) -> Schedule:
    if not callable(schedule) or isinstance(schedule, type):
        raise EmaError(f"{what} is a schedule, such as Constant(0.999), got {schedule!r}")
    return as_schedule(schedule)


def _asked(snapshots: Sequence[Snapshot], updates: int | None) -> tuple[int, int]:
    """Return the updates of the target, and the interval."""
    if not isinstance(snapshots, Sequence) or not all(isinstance(each, Snapshot) for each in snapshots):
        raise EmaError(f"expected a list of snapshots, got {snapshots!r}")
    if not snapshots:
        raise EmaError("expected at least one snapshot to combine, got none")
    for snapshot in snapshots:
        _check(snapshot.updates, snapshot.update_every)
        _checked(snapshot.schedule, "that of a snapshot")
    intervals = sorted({snapshot.update_every for snapshot in snapshots})
    if len(intervals) > 1:
        raise EmaError(f"expected snapshots with one update_every, got {', '.join(map(str, intervals))}")
    newest = max(snapshot.updates for snapshot in snapshots)
    updates = newest if updates is None else updates
    _check(updates, intervals[0])
    if updates > newest:
        raise EmaError(f"expected a target of at most {newest} updates, as the newest snapshot has, got {updates}")
    return updates, intervals[0]


def _check(updates: int, update_every: int) -> None:
    if not all(isinstance(each, Integral) for each in (updates, update_every)) or updates < 0 or update_every < 1:
        raise EmaError(
            f"expected at least 0 updates and an update_every of at least 1, both whole, got {updates!r} and {update_every!r}"
        )


def _check_tensors(tensors: object, what: str) -> None:
    if not isinstance(tensors, Mapping):
        raise EmaError(f"{what} has tensors by name, or a function that reads them, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise EmaError(f"{what} has tensors by name, got {type(tensor).__name__} under {name!r}")
        if problem := why_not_averaged(tensor):
            raise EmaError(f"{name} in {what} cannot be averaged: {problem}")


class _Sum:
    """A weighted sum of states. Integers, excluded names and what is not finite are those of the newest."""

    def __init__(self, newest: Snapshot, exclude: tuple[str, ...]) -> None:
        self._newest = newest
        self._exclude = exclude
        self._first: Snapshot | None = None
        self._like: State = {}
        self._sums: dict[str, Tensor] = {}
        self._copies: dict[str, Tensor] = {}

    def add(self, snapshot: Snapshot, value: float) -> None:
        """Read a state, add it, and let it go again."""
        tensors = snapshot.tensors() if callable(snapshot.tensors) else snapshot.tensors
        _check_tensors(tensors, f"the snapshot after {snapshot.updates} updates")
        if self._first is None:
            self._first = snapshot
            for pattern in self._exclude:
                if not any(fnmatchcase(name, pattern) for name in tensors):
                    raise EmaError(f"exclude={pattern!r} names nothing: there are {', '.join(list(tensors)[:10])} ...")
            self._like = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        if found := differences(self._like, tensors):
            raise EmaError(
                f"expected snapshots of one model, but that after {snapshot.updates} updates is not like that after "
                f"{self._first.updates}: {in_words(found)}"
            )
        for name, tensor in tensors.items():
            is_number = tensor.is_floating_point() or tensor.is_complex()
            summed = is_number and not any(fnmatchcase(name, pattern) for pattern in self._exclude)
            if summed:
                wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float64))
                self._sums[name] = self._sums[name].add_(wide, alpha=value) if name in self._sums else wide * value
            if snapshot is self._newest and not (summed and tensor.isfinite().all()):
                self._copies[name] = tensor.detach().clone()

    def state(self) -> dict[str, Tensor]:
        """Return the sum, in the order and the dtypes of the states."""
        return {name: self._of(name, like.dtype) for name, like in self._like.items()}

    def _of(self, name: str, dtype: torch.dtype) -> Tensor:
        found, newest = self._sums.get(name), self._copies.get(name)
        if found is None:
            return self._copies[name]
        found = found.to(dtype)
        # Coefficients have both signs, so that infinities of a mask would cancel to NaN.
        return found if newest is None else torch.where(newest.isfinite(), found, newest)
