"""Decay as a function of the update count."""

import dataclasses
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emaswap import Constant, ExponentialRamp, Schedule
from emaswap.schedule import window

SCHEDULES = [
    pytest.param(Constant(0.9), id="constant"),
    pytest.param(ExponentialRamp(0.999, 100.0), id="exponential ramp"),
]


@pytest.mark.parametrize(
    ("updates", "decay"),
    [
        pytest.param(0, 0.0, id="before the first update"),
        pytest.param(1, 0.0004998250, id="first update"),
        pytest.param(2000, 0.6320573468, id="after one tau"),
        pytest.param(10_000, 0.9931627268, id="after five tau"),
        pytest.param(10**9, 0.9999, id="in the end"),
    ],
)
def test_the_default_ramp_takes_the_values_of_yolov5(updates: int, decay: float) -> None:
    """The default exponential ramp is 0.9999·(1 - e^(-t/2000))."""
    assert ExponentialRamp()(updates) == pytest.approx(decay, abs=1e-10)


@given(st.floats(0, 1), st.floats(1e-3, 1e9), st.integers(0, 10**12), st.integers(0, 10**12))
def test_a_ramp_only_rises_and_stays_below_its_final_decay(decay: float, tau: float, some: int, more: int) -> None:
    """However it is set, a ramp rises from 0 towards its final decay and never passes it."""
    ramp = ExponentialRamp(decay, tau)
    earlier, later = sorted((some, more))
    assert 0 <= ramp(earlier) <= ramp(later) <= decay


@given(st.floats(0, 1), st.floats(0, 1e12))
def test_a_constant_schedule_does_not_look_at_the_count(decay: float, updates: float) -> None:
    """A constant schedule gives the same decay at every update."""
    assert Constant(decay)(updates) == decay


@pytest.mark.parametrize(
    ("schedule", "described"),
    [
        pytest.param(Constant(0.9), {"schedule": "constant", "decay": 0.9}, id="constant"),
        pytest.param(
            ExponentialRamp(0.999, 100.0), {"schedule": "exponential_ramp", "decay": 0.999, "tau": 100.0}, id="ramp"
        ),
    ],
)
def test_a_schedule_describes_itself(schedule: Schedule, described: dict[str, str | float]) -> None:
    """A description names the schedule and all of its parameters."""
    assert schedule.describe() == described


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_is_a_value(schedule: Schedule) -> None:
    """A schedule survives pickling as an equal one, and cannot be changed."""
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.decay = 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("decay", "updates"),
    [
        pytest.param(0.0, 1.0, id="no memory"),
        pytest.param(0.9, 10.0, id="short"),
        pytest.param(0.9999, 10_000.0, id="long"),
        pytest.param(1.0, math.inf, id="frozen"),
    ],
)
def test_the_window_is_the_number_of_updates_that_a_decay_looks_back_over(decay: float, updates: float) -> None:
    """A decay β averages over about 1/(1-β) updates."""
    assert window(decay) == pytest.approx(updates)


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.9999])
def test_after_one_window_the_old_weight_is_down_to_1_over_e(decay: float) -> None:
    """What an average held one window ago still counts for about 1/e."""
    assert decay ** window(decay) == pytest.approx(1 / math.e, rel=0.06)
