"""The average of numbers, and of tensors."""

import math
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from emaswap import EMA, EmaError

ALPHAS = [0.1, 0.5, 0.9]


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test."""
    torch.manual_seed(0)


@settings(deadline=None)
@given(st.floats(1e-8, 1, exclude_min=True), st.integers(1, 300), st.floats(-1e6, 1e6).filter(lambda x: abs(x) > 1e-6))
def test_a_constant_input_averages_to_that_constant(alpha: float, count: int, constant: float) -> None:
    """Whatever alpha and however few the updates, a constant input gives just that constant."""
    ema = EMA[float](alpha)
    for _ in range(count):
        ema.update(constant)
    assert ema.get() == pytest.approx(constant, rel=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_a_constant_input_of_1_averages_to_1(alpha: float, count: int) -> None:
    """The weight that n inputs have received is 1 - (1-alpha)^n, not 1 - alpha^n: ones average to one."""
    ema = EMA[float](alpha)
    for _ in range(count):
        ema.update(1.0)
    assert ema.get() == pytest.approx(1, rel=1e-12)


@settings(deadline=None)
@given(st.floats(1e-4, 1), st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50))
def test_the_average_is_the_weighted_mean_of_its_inputs(alpha: float, inputs: list[float]) -> None:
    """An input that is k updates old weighs (1-alpha)^k; the average is the mean with these weights."""
    ema = EMA[float](alpha)
    for x in inputs:
        ema.update(x)
    weights = [(1 - alpha) ** age for age in reversed(range(len(inputs)))]
    mean = math.fsum(w * x for w, x in zip(weights, inputs, strict=True)) / math.fsum(weights)
    assert ema.get() == pytest.approx(mean, rel=1e-9, abs=1e-8)


@settings(deadline=None)
@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=20))
@example([1e20, 1.0])
def test_with_alpha_1_the_average_is_the_newest_input(inputs: list[float]) -> None:
    """An alpha of 1 remembers nothing: neither an outlier nor the rounding it causes stays in the average."""
    ema = EMA[float](1.0)
    for x in inputs:
        ema.update(x)
    assert ema.get() == inputs[-1]


@pytest.mark.parametrize(
    "alpha",
    [0, -0.1, 1.000001, math.nan, math.inf, -math.inf],
    ids=["zero", "negative", "above 1", "nan", "inf", "-inf"],
)
def test_an_alpha_out_of_range_is_an_error(alpha: float) -> None:
    """Only an alpha above 0 and up to 1 makes an average."""
    with pytest.raises(EmaError, match="alpha must be above 0 and at most 1"):
        EMA[float](alpha)


def test_there_is_no_average_before_the_first_update() -> None:
    """Asking too early is a clear error, not 0/0."""
    with pytest.raises(EmaError, match="before any update"):
        EMA[float](0.5).get()


def test_tensors_are_averaged_element_by_element() -> None:
    """The average of tensors is that of their elements."""
    inputs = torch.randn(5, 3)
    ema = EMA[Tensor](0.3)
    for row in inputs:
        ema.update(row)
    for column in range(3):
        single = EMA[float](0.3)
        for value in inputs[:, column].tolist():
            single.update(value)
        assert ema.get()[column].item() == pytest.approx(single.get(), rel=1e-6)


def test_an_average_of_tensors_keeps_neither_history_nor_the_inputs_memory() -> None:
    """A loss that is averaged does not hold its graph, and changing an input later does not change the average."""
    weight = torch.ones(2, requires_grad=True)
    ema = EMA[Tensor](0.5)
    ema.update(weight * 2)
    x = torch.full((2,), 2.0)
    ema.update(x)
    x.zero_()
    average = ema.get()
    assert not average.requires_grad
    assert average.tolist() == pytest.approx([2, 2])


def test_an_average_that_was_handed_out_does_not_move() -> None:
    """Later updates leave an earlier answer as it was."""
    ema = EMA[Tensor](1.0)
    ema.update(torch.ones(1))
    before = ema.get()
    ema.update(torch.zeros(1))
    assert before.item() == 1


@pytest.mark.parametrize("alpha", ALPHAS)
def test_an_averager_goes_on_from_its_state(alpha: float) -> None:
    """An averager that loads another's state goes on as that one does, to the last bit."""
    first, second = EMA[float](alpha), EMA[float](0.7)
    first.update(1.0)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    for ema in (first, second):
        ema.update(3.0)
    assert first.get() == second.get()
    assert first.state_dict() == second.state_dict()
