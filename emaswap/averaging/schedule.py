"""Decay as a pure function of the update count.

A schedule maps the number of the update being made (1 for the first) to the decay β of that update:
`average ← β·average + (1−β)·weights`. Schedules are frozen values: they pickle, compare, and describe themselves, and
`make_schedule` makes them by name, also from their own description.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Protocol, Self, cast

from emaswap.errors import EmaError

Description = dict[str, str | float]


class Schedule(Protocol):
    """What `ModelEMA` needs of a schedule."""

    def __call__(self, updates: float) -> float: ...

    def describe(self) -> Description:
        """Return the schedule's name under "name", and its parameters: they go into every manifest."""
        ...


class _Named:
    """A dataclass that describes itself by its name and fields."""

    name: str

    def describe(self) -> Description:
        return {"name": self.name, **{each.name: getattr(self, each.name) for each in fields(self)}}  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            if each.type is float:  # and nothing that a schedule derived from this one may hold besides
                _check_number(f"{self.name}: {each.name}", getattr(self, each.name))

    def _check(self, *, holds: bool, expected: str) -> None:
        if not holds:
            raise EmaError(f"{self.name}: expected {expected}, got {self!r}")


@dataclass(frozen=True)
class Constant(_Named):
    """The same decay at every update; averages over about 1/(1−decay) of them."""

    decay: float
    name = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(holds=0 <= self.decay <= 1, expected="a decay in [0, 1]")

    @classmethod
    def of_window(cls, window: float) -> Self:
        """Return the decay that averages over about `window` updates (at least 1): after so many, 1/e of the old is left."""
        _check_number("a window", window)
        if not window >= 1:
            raise EmaError(f"a window is of at least 1 update, got {window}")
        return cls(1 - 1 / window)

    @classmethod
    def of_half_life(cls, half_life: float) -> Self:
        """Return the decay after whose `half_life` updates (above 0) half of the old average is left."""
        _check_number("a half-life", half_life)
        if not half_life > 0:
            raise EmaError(f"a half-life is of more than 0 updates, got {half_life}")
        return cls(2 ** (-1 / half_life))

    def __call__(self, updates: float) -> float:  # noqa: ARG002  (every schedule is called alike)
        return self.decay


@dataclass(frozen=True)
class ExponentialRamp(_Named):
    """decay·(1 − e^(−updates/tau)): short memory while the weights still move fast, the full one after a few `tau`.

    The schedule of YOLOv5's `ModelEMA`, with its defaults.
    """

    decay: float = 0.9999
    tau: float = 2000.0
    name = "exponential_ramp"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(holds=0 <= self.decay <= 1 and self.tau > 0, expected="a decay in [0, 1] and a tau above 0")

    def __call__(self, updates: float) -> float:
        return self.decay * -math.expm1(-updates / self.tau)


@dataclass(frozen=True)
class CountRamp(_Named):
    """min(decay, (1 + updates)/(10 + updates)): the average looks back over about a ninth of all updates so far.

    The `num_updates` rule of TensorFlow's `ExponentialMovingAverage`, counted as torch-ema does: 2/11 at the first.
    """

    decay: float = 0.9999
    name = "count_ramp"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(holds=0 <= self.decay <= 1, expected="a decay in [0, 1]")

    def __call__(self, updates: float) -> float:
        return min(self.decay, (1 + updates) / (10 + updates))


@dataclass(frozen=True)
class InverseGamma(_Named):
    """1 − (1 + (updates−1)/gamma)^(−power) within [minimum, decay]; the first update takes the weights as they are.

    The warm-up of timm and diffusers, after https://github.com/crowsonkb/k-diffusion. With gamma 1, power 2/3 suits a
    million updates or more (0.999 at 31.6 thousand, 0.9999 at 1 million), 3/4 fewer (0.999 at 10 thousand).
    """

    decay: float = 0.9999
    gamma: float = 1.0
    power: float = 2 / 3
    minimum: float = 0.0
    name = "inverse_gamma"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            holds=0 <= self.minimum <= self.decay <= 1 and self.gamma > 0 and self.power > 0,
            expected="0 ≤ minimum ≤ decay ≤ 1, and gamma and power above 0",
        )

    def __call__(self, updates: float) -> float:
        value = -math.expm1(-self.power * math.log1p(max(0.0, updates - 1) / self.gamma))
        return min(self.decay, max(self.minimum, value))


@dataclass(frozen=True)
class PowerFunction(_Named):
    """(1 − 1/updates)^(gamma+1): the weight of an old update falls with its share of all updates, to the power gamma.

    The power function EMA of EDM2 (arXiv 2312.02696, section 3): its window grows along with training, at a constant
    relative width `sigma_rel`. The first update takes the weights as they are.
    """

    gamma: float
    name = "power_function"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(holds=self.gamma > -1 and math.isfinite(self.gamma), expected="a gamma above -1")

    @classmethod
    def from_sigma_rel(cls, sigma_rel: float) -> Self:
        """Return the schedule of a profile whose standard deviation is this share of training so far: 0.05 is gamma 16.97, 0.10 is 6.94.

        Solves σ² = (γ+1)/((γ+2)²·(γ+3)), the variance of the density (γ+1)·t^γ on [0, 1], for the larger γ.
        """
        _check_number("sigma_rel", sigma_rel)
        limit = 1 / math.sqrt(12)  # of the uniform average, γ = 0
        if not 0 < sigma_rel <= limit:
            raise EmaError(
                f"sigma_rel is above 0 and at most {limit:.4f} (the plain mean of all updates), got {sigma_rel}"
            )
        low, high = 0.0, 2.0 / sigma_rel  # σ ≈ 1/γ when narrow, so the root is below
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if sigma_rel_of(middle) > sigma_rel else (low, middle)
        return cls((low + high) / 2)

    @property
    def sigma_rel(self) -> float:
        """The profile's standard deviation as a share of training so far."""
        return sigma_rel_of(self.gamma)

    def __call__(self, updates: float) -> float:
        return (1 - 1 / updates) ** (self.gamma + 1) if updates > 1 else 0.0


@dataclass(frozen=True)
class Scaled:
    """Another schedule's decay to the power `kappa`: what to use when the batch is `kappa` times as large.

    The scaling rule of arXiv 2307.13813: one update then stands for `kappa` of those that the schedule was chosen for.
    """

    schedule: Schedule
    kappa: float

    def __post_init__(self) -> None:
        if not hasattr(self.schedule, "describe"):
            raise EmaError(f"what is scaled is a schedule, such as Constant(0.999), got {self.schedule!r}")
        _check_number("kappa", self.kappa)
        if not self.kappa > 0:
            raise EmaError(f"kappa is the factor of the batch size, above 0; got {self.kappa}")

    def __call__(self, updates: float) -> float:
        return float(self.schedule(updates) ** self.kappa)

    def describe(self) -> Description:
        inner = self.schedule.describe()
        return {**inner, "kappa": self.kappa * float(inner.get("kappa", 1))}


@dataclass(frozen=True)
class Custom:
    """A function of the update count as a schedule, as scripts write it: `ema.decay = lambda updates: ...`.

    Its name says that nobody can make it again from its description: to resume, set the same function first.
    """

    function: Callable[[float], float]

    def __call__(self, updates: float) -> float:
        return self.function(updates)

    def describe(self) -> Description:
        return {"name": "custom"}


def is_number(value: object) -> bool:
    """Return whether a value is a real number of Python or numpy that a float can hold, and no truth value."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _check_number(what: str, value: object) -> None:
    if not is_number(value):
        raise EmaError(f"{what} is a number that a float can hold, got {value!r}")


def as_schedule(decay: object, tau: float = 2000.0) -> Schedule:
    """Return a schedule as it is, a function as `Custom`, and a number as the final decay of an `ExponentialRamp`.

    Raises `EmaError` for anything else.
    """
    _check_number("tau", tau)
    if callable(decay) and not isinstance(decay, type):
        return cast("Schedule", decay) if hasattr(decay, "describe") else Custom(decay)
    if is_number(decay):
        return ExponentialRamp(float(decay), tau)  # type: ignore[arg-type]
    raise EmaError(
        f"a decay is a number in [0, 1], a schedule or a function of the update count, got {decay!r}; "
        "make_schedule() makes a schedule by name"
    )


_BY_NAME = {kind.name: kind for kind in (Constant, ExponentialRamp, CountRamp, InverseGamma, PowerFunction)}
SCHEDULES = tuple(_BY_NAME)


def make_schedule(name: str, /, **parameters: Any) -> Schedule:
    """Return a schedule by its name (one of `SCHEDULES`); `PowerFunction` takes `sigma_rel` or `gamma`; `kappa` scales any.

    Raises `EmaError` for an unknown name or parameter, naming those there are.
    """
    kind = _BY_NAME.get(name) if isinstance(name, str) else None
    if kind is None:
        raise EmaError(f"unknown schedule {name!r}: expected one of {', '.join(SCHEDULES)}")
    kappa = parameters.pop("kappa", None)
    make: Any = kind
    if kind is PowerFunction and "sigma_rel" in parameters:
        make = PowerFunction.from_sigma_rel
    try:
        schedule: Schedule = make(**parameters)
        return schedule if kappa is None else Scaled(schedule, kappa)
    except TypeError as error:
        takes = [*inspect.signature(kind).parameters, *(["sigma_rel"] if kind is PowerFunction else []), "kappa"]
        raise EmaError(f"{name} takes {', '.join(takes)}: {error}") from None


def from_description(description: Mapping[str, Any]) -> Schedule:
    """Return the schedule that described itself so. Raises `EmaError` when it is none of this module's."""
    if not all(isinstance(name, str) for name in description):
        raise EmaError(f"a schedule is described by texts as names, got {', '.join(map(repr, description))}")
    parameters = dict(description)
    return make_schedule(str(parameters.pop("name", None)), **parameters)


def span_decay(schedule: Schedule, first: int, last: int) -> float:
    """Return the decay of the updates `first` to `last` together, exactly: the product of what `decay_at` returns."""
    if type(schedule) is Constant:
        return float(schedule.decay ** (last - first + 1))
    return math.prod(decay_at(schedule, number) for number in range(first, last + 1))


def decay_at(schedule: Schedule, updates: int) -> float:
    """Return the decay of one update. Raises `EmaError` for a schedule that gives no number in [0, 1]."""
    found = schedule(updates)
    try:
        decay = math.nan if isinstance(found, (str, bool)) else float(found)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        decay = math.nan
    if not 0 <= decay <= 1:
        raise EmaError(f"a decay must be a number in [0, 1], and {schedule!r} gave {found!r} at update {updates}")
    return decay


def sigma_rel_of(gamma: float) -> float:
    """Return the relative width of the power function's profile with this exponent."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def window(decay: float) -> float:
    """Return about how many updates an average with this decay looks back over: 1/(1−decay)."""
    return math.inf if decay >= 1 else 1 / (1 - decay)


def half_life(decay: float) -> float:
    """Return after how many updates with this decay half of the old average is left."""
    return math.inf if decay >= 1 else 0.0 if decay <= 0 else -math.log(2) / math.log(decay)
