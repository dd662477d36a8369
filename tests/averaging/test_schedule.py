"""Decay as a function of the update count."""

import dataclasses
import json
import math
import pickle
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emaswap import (
    Constant,
    CountRamp,
    EmaError,
    ExponentialRamp,
    InverseGamma,
    PowerFunction,
    Scaled,
    Schedule,
    make_schedule,
)
from emaswap.averaging.schedule import SCHEDULES, from_description, half_life, sigma_rel_of, span_decay, window

EACH = [
    pytest.param(Constant(0.9), {"name": "constant", "decay": 0.9}, id="constant"),
    pytest.param(ExponentialRamp(0.999, 100.0), {"name": "exponential_ramp", "decay": 0.999, "tau": 100.0}, id="ramp"),
    pytest.param(CountRamp(0.99), {"name": "count_ramp", "decay": 0.99}, id="count ramp"),
    pytest.param(
        InverseGamma(0.999, 2.0, 0.75, 0.1),
        {"name": "inverse_gamma", "decay": 0.999, "gamma": 2.0, "power": 0.75, "minimum": 0.1},
        id="inverse gamma",
    ),
    pytest.param(PowerFunction(6.94), {"name": "power_function", "gamma": 6.94}, id="power function"),
    pytest.param(
        Scaled(ExponentialRamp(0.999, 100.0), 4.0),
        {"name": "exponential_ramp", "decay": 0.999, "tau": 100.0, "kappa": 4.0},
        id="scaled",
    ),
    pytest.param(
        Scaled(Scaled(Constant(0.9), 2.0), 3.0), {"name": "constant", "decay": 0.9, "kappa": 6.0}, id="scaled twice"
    ),
]

decays = st.floats(0, 1)
counts = st.integers(1, 10**9)
schedules = st.one_of(
    st.builds(Constant, decays),
    st.builds(ExponentialRamp, decays, st.floats(1e-3, 1e9)),
    st.builds(CountRamp, decays),
    st.builds(InverseGamma, decays, st.floats(1e-3, 1e6), st.floats(1e-3, 3)),
    st.builds(PowerFunction, st.floats(-0.9, 100)),
    st.builds(Scaled, st.builds(ExponentialRamp, decays), st.floats(1e-3, 1e3)),
)


# -- the published values ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("updates", "decay"),
    [
        pytest.param(1, 2 / 11, id="first update"),
        pytest.param(2, 3 / 12, id="second update"),
        pytest.param(89_980, 0.9999 - 1e-9, id="just before the final decay"),
        pytest.param(90_000, 0.9999, id="in the end"),
    ],
)
def test_the_count_ramp_takes_the_values_of_torch_ema(updates: int, decay: float) -> None:
    """The count ramp is min(0.9999, (1+n)/(10+n)), with n counted before it is used: 2/11 at the first update."""
    assert CountRamp()(updates) == pytest.approx(decay, abs=2e-8)


@pytest.mark.parametrize(
    ("schedule", "updates", "decay"),
    [
        pytest.param(InverseGamma(), 1, 0.0, id="timm: the first update copies"),
        pytest.param(InverseGamma(), 2, 0.370, id="timm: step 2"),
        pytest.param(InverseGamma(minimum=0.2), 1, 0.2, id="never below the minimum"),
        pytest.param(InverseGamma(decay=0.3), 2, 0.3, id="never above the final decay"),
        pytest.param(InverseGamma(power=2 / 3), 31_623, 0.999, id="2/3: 0.999 at 31.6 thousand"),
        pytest.param(InverseGamma(power=2 / 3), 1_000_000, 0.9999, id="2/3: 0.9999 at a million"),
        pytest.param(InverseGamma(power=3 / 4), 10_000, 0.999, id="3/4: 0.999 at 10 thousand"),
        pytest.param(InverseGamma(gamma=9.0, power=1.0), 2, 0.1, id="gamma stretches the count"),
    ],
)
def test_the_inverse_gamma_takes_the_values_of_timm(schedule: Schedule, updates: int, decay: float) -> None:
    """The warm-up is 1 - (1 + (t-1)/gamma)^(-power), clipped."""
    assert schedule(updates) == pytest.approx(decay, abs=5e-4 if updates == 2 else 1e-6)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_a_relative_width_is_the_exponent_that_edm2_publishes(sigma_rel: float, gamma: float) -> None:
    """The relative widths 0.05 and 0.10 are the exponents 16.97 and 6.94."""
    assert PowerFunction.from_sigma_rel(sigma_rel).gamma == pytest.approx(gamma, abs=0.005)


@given(st.floats(1e-3, 1 / math.sqrt(12)))
def test_a_power_function_has_the_relative_width_it_was_made_from(sigma_rel: float) -> None:
    """From a relative width to the exponent and back."""
    assert PowerFunction.from_sigma_rel(sigma_rel).sigma_rel == pytest.approx(sigma_rel, rel=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 6.94])
def test_the_relative_width_is_the_standard_deviation_of_the_profile(gamma: float) -> None:
    """After many updates, the times of the weights in the average spread by sigma_rel of the whole time."""
    schedule, last = PowerFunction(gamma), 20_000
    share, shares = 1.0, {}
    for t in range(last, 0, -1):
        shares[t] = share * (1 - schedule(t))
        share *= schedule(t)
    mean = math.fsum(weight * t for t, weight in shares.items())
    variance = math.fsum(weight * (t - mean) ** 2 for t, weight in shares.items())
    assert math.fsum(shares.values()) == pytest.approx(1)
    assert math.sqrt(variance) / last == pytest.approx(sigma_rel_of(gamma), rel=1e-3)


def test_a_power_function_of_exponent_0_is_the_plain_mean() -> None:
    """With gamma 0, all updates have the same weight in the average."""
    average = 0.0
    for t, x in enumerate([5.0, 1.0, 3.0, 7.0], start=1):
        decay = PowerFunction(0.0)(t)
        average = decay * average + (1 - decay) * x
    assert average == pytest.approx(4.0)


@pytest.mark.parametrize("updates", [0, 1])
@pytest.mark.parametrize("schedule", [InverseGamma(), PowerFunction(6.94)], ids=["inverse gamma", "power function"])
def test_the_first_update_takes_the_weights_as_they_are(schedule: Schedule, updates: int) -> None:
    """These schedules remember nothing of the initial weights."""
    assert schedule(updates) == 0


# -- what holds for all --------------------------------------------------------------------------------------------


@given(st.floats(0, 1), st.floats(1e-3, 1e9), st.integers(0, 10**12), st.integers(0, 10**12))
def test_a_ramp_only_rises_and_stays_below_its_final_decay(decay: float, tau: float, some: int, more: int) -> None:
    """However it is set, a ramp rises from 0 towards its final decay and never passes it."""
    ramp = ExponentialRamp(decay, tau)
    earlier, later = sorted((some, more))
    assert 0 <= ramp(earlier) <= ramp(later) <= decay


@given(schedules, counts, counts)
def test_a_decay_is_between_0_and_1_and_only_rises(schedule: Schedule, some: int, more: int) -> None:
    """However a schedule is set, its decay is one, and the average's memory only grows."""
    earlier, later = sorted((some, more))
    assert 0 <= schedule(earlier) <= schedule(later) + 1e-15
    assert schedule(later) <= 1


@given(st.floats(0, 1), st.floats(0, 1e12))
def test_a_constant_schedule_does_not_look_at_the_count(decay: float, updates: float) -> None:
    """A constant schedule gives the same decay at every update."""
    assert Constant(decay)(updates) == decay


@given(st.builds(InverseGamma, st.floats(0.5, 1), st.floats(1e-3, 1e6), st.floats(1e-3, 3), st.floats(0, 0.5)), counts)
def test_an_inverse_gamma_stays_between_its_bounds(schedule: InverseGamma, updates: int) -> None:
    """Neither early nor late does the warm-up leave [minimum, decay]."""
    assert schedule.minimum <= schedule(updates) <= schedule.decay


@given(schedules, st.floats(1e-2, 1e2), counts)
def test_a_batch_kappa_times_as_large_has_the_decay_to_the_power_kappa(
    schedule: Schedule, kappa: float, updates: int
) -> None:
    """The scaling rule: β^κ."""
    assert Scaled(schedule, kappa)(updates) == pytest.approx(schedule(updates) ** kappa)


def test_an_update_of_a_large_batch_forgets_as_much_as_all_the_small_ones() -> None:
    """Scaled by 8, one update leaves as much of the old average as eight updates unscaled."""
    assert Scaled(Constant(0.99), 8)(1) == pytest.approx(span_decay(Constant(0.99), 1, 8), rel=1e-14)


# -- as values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "described"), EACH)
def test_a_schedule_describes_itself(schedule: Schedule, described: dict[str, str | float]) -> None:
    """A description names the schedule and all of its parameters."""
    assert schedule.describe() == described


@pytest.mark.parametrize(("schedule", "described"), EACH)
def test_a_description_makes_the_schedule_again(schedule: Schedule, described: dict[str, str | float]) -> None:
    """What went through JSON into a manifest and back makes a schedule of the same decays and description."""
    again = from_description(json.loads(json.dumps(described)))
    assert again.describe() == described
    for updates in (1, 2, 10, 1000, 10**6):
        assert again(updates) == pytest.approx(schedule(updates), rel=1e-14)


@given(schedules)
def test_every_schedule_is_made_again_by_its_description(schedule: Schedule) -> None:
    """However it is set, the description is enough, to the last bit."""
    assert from_description(json.loads(json.dumps(schedule.describe()))) == schedule


@pytest.mark.parametrize(("schedule", "described"), EACH)
def test_a_schedule_is_a_value(schedule: Schedule, described: dict[str, str | float]) -> None:
    """A schedule survives pickling as an equal one, serves as a key, and cannot be changed."""
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule
    assert {schedule: 1}[again] == 1
    parameter = list(described)[-1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, parameter, 0.5)


# -- made by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "schedule"),
    [
        pytest.param("constant", {"decay": 0.9}, Constant(0.9), id="constant"),
        pytest.param("exponential_ramp", {}, ExponentialRamp(), id="ramp by default"),
        pytest.param("exponential_ramp", {"tau": 10}, ExponentialRamp(tau=10), id="ramp"),
        pytest.param("count_ramp", {"decay": 0.9}, CountRamp(0.9), id="count ramp"),
        pytest.param("inverse_gamma", {"power": 0.75}, InverseGamma(power=0.75), id="inverse gamma"),
        pytest.param("power_function", {"gamma": 3}, PowerFunction(3), id="power function"),
        pytest.param(
            "power_function", {"sigma_rel": 0.1}, PowerFunction.from_sigma_rel(0.1), id="power function by width"
        ),
        pytest.param("constant", {"decay": 0.9, "kappa": 2}, Scaled(Constant(0.9), 2), id="scaled"),
        pytest.param(
            "power_function",
            {"sigma_rel": 0.1, "kappa": 2},
            Scaled(PowerFunction.from_sigma_rel(0.1), 2),
            id="power function by width, scaled",
        ),
    ],
)
def test_a_schedule_is_made_by_its_name(name: str, parameters: dict[str, float], schedule: Schedule) -> None:
    """Name and parameters make the very schedule that the class makes."""
    assert make_schedule(name, **parameters) == schedule


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        pytest.param("cosine", {}, f"unknown schedule 'cosine': expected one of {', '.join(SCHEDULES)}", id="name"),
        pytest.param("constant", {}, "constant takes decay, kappa: .*missing.*decay", id="missing"),
        pytest.param("constant", {"beta": 1}, "constant takes decay, kappa: .*beta", id="unknown"),
        pytest.param("constant", {"name": 1}, "constant takes decay, kappa: .*name", id="called name"),
        pytest.param("constant", {"decay": 0.9, "tau": 1}, "constant takes decay, kappa: .*tau", id="another's"),
        pytest.param("constant", {"decay": "long"}, "constant: decay is a number .*, got 'long'", id="not a number"),
        pytest.param(
            "power_function", {"sigma": 0.1}, "power_function takes gamma, sigma_rel, kappa: .*sigma", id="misspelt"
        ),
        pytest.param(
            "power_function", {"gamma": 1, "sigma_rel": 0.1}, "power_function takes gamma, sigma_rel, kappa", id="both"
        ),
        pytest.param("inverse_gamma", {"tau": 1}, "inverse_gamma takes decay, gamma, power, minimum, kappa", id="tau"),
        pytest.param("constant", {"decay": 0.9, "kappa": "two"}, "kappa is a number .*, got 'two'", id="kappa of text"),
    ],
)
def test_what_cannot_be_made_is_an_error_that_names_what_there_is(
    name: str, parameters: dict[str, Any], message: str
) -> None:
    """Unknown names and parameters are answered with the known ones."""
    with pytest.raises(EmaError, match=message):
        make_schedule(name, **parameters)


def test_a_description_whose_names_are_no_texts_is_an_error() -> None:
    """What names there are is said."""
    with pytest.raises(EmaError, match="described by texts as names, got 'name', 5"):
        from_description({"name": "constant", 5: 1})  # type: ignore[dict-item]


@pytest.mark.parametrize("description", [{}, {"decay": 0.9}, {"name": "mine", "decay": 0.9}], ids=str)
def test_a_description_of_no_known_schedule_is_an_error(description: dict[str, Any]) -> None:
    """What this module did not describe is refused, with the names that there are."""
    with pytest.raises(EmaError, match="unknown schedule .*: expected one of constant, exponential_ramp"):
        from_description(description)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: Constant(1.1), r"constant: expected a decay in \[0, 1\], got .*1.1", id="above 1"),
        pytest.param(lambda: Constant(None), "constant: decay is a number .*, got None", id="none"),  # type: ignore[arg-type]
        pytest.param(lambda: Constant(10**400), "constant: decay is a number that a float can hold", id="huge"),
        pytest.param(
            lambda: ExponentialRamp(0.9, "5"),  # type: ignore[arg-type]
            "exponential_ramp: tau is a number .*, got '5'",
            id="tau of text",
        ),
        pytest.param(lambda: PowerFunction(10**400), "power_function: gamma is a number", id="huge gamma"),
        pytest.param(lambda: PowerFunction.from_sigma_rel(None), "sigma_rel is a number", id="no sigma_rel"),  # type: ignore[arg-type]
        pytest.param(lambda: Constant.of_window("5"), "a window is a number", id="window of text"),  # type: ignore[arg-type]
        pytest.param(lambda: Constant.of_half_life(None), "a half-life is a number", id="no half-life"),  # type: ignore[arg-type]
        pytest.param(lambda: Scaled(Constant(0.9), 10**400), "kappa is a number", id="huge kappa"),
        pytest.param(lambda: make_schedule([]), r"unknown schedule \[\]", id="no name"),  # type: ignore[arg-type]
        pytest.param(lambda: Constant(math.nan), r"constant: expected a decay in \[0, 1\]", id="nan"),
        pytest.param(lambda: ExponentialRamp(0.9, 0), "exponential_ramp: expected .* a tau above 0", id="tau"),
        pytest.param(lambda: ExponentialRamp(-0.1), "exponential_ramp: expected a decay", id="negative"),
        pytest.param(lambda: CountRamp(2), "count_ramp: expected a decay", id="count ramp"),
        pytest.param(lambda: InverseGamma(gamma=0), "inverse_gamma: expected .* gamma and power above 0", id="gamma"),
        pytest.param(lambda: InverseGamma(power=0), "inverse_gamma: expected .* gamma and power above 0", id="power"),
        pytest.param(lambda: InverseGamma(0.5, minimum=0.6), "inverse_gamma: expected 0 ≤ minimum", id="minimum"),
        pytest.param(lambda: PowerFunction(-1), "power_function: expected a gamma above -1", id="exponent"),
        pytest.param(lambda: PowerFunction(math.inf), "power_function: expected a gamma above -1", id="infinite"),
        pytest.param(lambda: PowerFunction.from_sigma_rel(0), "sigma_rel is above 0 and at most 0.2887", id="no width"),
        pytest.param(
            lambda: PowerFunction.from_sigma_rel(0.3), "sigma_rel is above 0 and at most 0.2887", id="too wide"
        ),
        pytest.param(lambda: PowerFunction.from_sigma_rel(5e-324), "power_function: expected a gamma", id="too narrow"),
        pytest.param(lambda: Scaled(Constant(0.9), 0), "kappa is the factor of the batch size, above 0", id="kappa"),
        pytest.param(lambda: Constant.of_window(0.5), "a window is of at least 1 update, got 0.5", id="window"),
        pytest.param(lambda: Constant.of_half_life(0), "a half-life is of more than 0 updates, got 0", id="half-life"),
    ],
)
def test_a_parameter_out_of_range_is_an_error(make: Any, message: str) -> None:
    """What a parameter must be, and what came, is in the error."""
    with pytest.raises(EmaError, match=message):
        make()


# -- several updates at once ---------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(schedules, st.integers(1, 10_000), st.integers(0, 60))
def test_the_decay_of_a_span_is_the_product_of_its_decays(schedule: Schedule, first: int, more: int) -> None:
    """The decays of a span of updates, multiplied without rounding, are its decay."""
    product = math.prod((Fraction(schedule(t)) for t in range(first, first + more + 1)), start=Fraction(1))
    assert span_decay(schedule, first, first + more) == pytest.approx(float(product), rel=1e-13, abs=1e-300)


@given(schedules, counts)
def test_the_decay_of_a_span_of_one_is_that_of_the_update(schedule: Schedule, update: int) -> None:
    """One update alone is no approximation."""
    assert span_decay(schedule, update, update) == schedule(update)


@settings(max_examples=50)
@given(st.floats(-0.5, 30), st.integers(1, 10**6), st.integers(1, 300))
def test_the_spans_of_a_power_function_telescope(gamma: float, before: int, more: int) -> None:
    """From update a to update b, a power function leaves (a/b)^(gamma+1) of the average, however many lie between."""
    span = span_decay(PowerFunction(gamma), before + 1, before + more)
    assert span == pytest.approx((before / (before + more)) ** (gamma + 1), rel=1e-10)


@pytest.mark.parametrize("schedule", [PowerFunction(6.94), InverseGamma()], ids=["power function", "inverse gamma"])
def test_a_span_with_the_first_update_leaves_nothing_of_the_initial_weights(schedule: Schedule) -> None:
    """A schedule that takes the first weights as they are does so also when it is made together with others."""
    assert span_decay(schedule, 1, 10) == 0


# -- words for decays ----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("decay", "updates"),
    [
        pytest.param(0.0, 0.0, id="no memory"),
        pytest.param(0.5, 1.0, id="half at once"),
        pytest.param(0.9999, 6931.1, id="long"),
        pytest.param(1.0, math.inf, id="frozen"),
    ],
)
def test_the_half_life_is_the_number_of_updates_that_leave_half(decay: float, updates: float) -> None:
    """A decay β leaves half of the old average after -ln 2 / ln β updates."""
    assert half_life(decay) == pytest.approx(updates, rel=1e-5)


@given(st.floats(1, 1e6))
def test_a_constant_of_a_window_has_that_window(updates: float) -> None:
    """From a window to the decay and back."""
    assert window(Constant.of_window(updates)(1)) == pytest.approx(updates, rel=1e-9)


@given(st.floats(0.01, 1e6))
def test_a_constant_of_a_half_life_has_that_half_life(updates: float) -> None:
    """From a half-life to the decay and back: so many updates leave half."""
    decay = Constant.of_half_life(updates)(1)
    assert half_life(decay) == pytest.approx(updates, rel=1e-8)
    assert decay**updates == pytest.approx(0.5, rel=1e-8)


@pytest.mark.parametrize("of", [Constant.of_window, Constant.of_half_life], ids=["window", "half-life"])
def test_an_endless_memory_is_a_decay_of_1(of: Any) -> None:
    """An infinite window or half-life freezes the average."""
    assert of(math.inf) == Constant(1.0)


def test_the_window_of_a_ramp_grows_with_training() -> None:
    """The count ramp looks back over about a ninth of all updates so far."""
    windows = [window(CountRamp()(t)) for t in (90, 900, 9000)]
    assert windows == pytest.approx([t / 9 + 10 / 9 for t in (90, 900, 9000)])
    assert all(earlier < later for earlier, later in pairwise(windows))
