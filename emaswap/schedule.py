"""Decay as a pure function of the update count.

A schedule maps the number of the update being made (1 for the first) to the decay β of that update:
`average ← β·average + (1−β)·weights`. Schedules are frozen values: they pickle, compare, and describe themselves.
"""

import math
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """What `ModelEMA` needs of a schedule."""

    def __call__(self, updates: float) -> float: ...

    def describe(self) -> dict[str, str | float]:
        """The schedule's name under "schedule", and its parameters: it goes into every manifest."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same decay at every update; averages over about 1/(1−decay) of them."""

    decay: float

    def __call__(self, updates: float) -> float:  # noqa: ARG002  (every schedule is called alike)
        return self.decay

    def describe(self) -> dict[str, str | float]:
        return {"schedule": "constant", "decay": self.decay}


@dataclass(frozen=True)
class ExponentialRamp:
    """decay·(1 − e^(−updates/tau)): short memory while the weights still move fast, the full one after a few `tau`.

    The schedule of YOLOv5's `ModelEMA`, with its defaults.
    """

    decay: float = 0.9999
    tau: float = 2000.0

    def __call__(self, updates: float) -> float:
        return self.decay * -math.expm1(-updates / self.tau)

    def describe(self) -> dict[str, str | float]:
        return {"schedule": "exponential_ramp", "decay": self.decay, "tau": self.tau}


def window(decay: float) -> float:
    """About how many updates an average with this decay looks back over: 1/(1−decay)."""
    return math.inf if decay >= 1 else 1 / (1 - decay)
