"""The average of numbers, and of tensors."""

import math
import pickle
from typing import Any

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
    """Later updates leave an earlier answer as it was, and what is done to an answer leaves the average."""
    ema = EMA[Tensor](1.0)
    ema.update(torch.ones(1))
    before = ema.get()
    ema.update(torch.zeros(1))
    assert before.item() == 1
    ema.get().fill_(7)
    assert ema.get().item() == 0


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e5m2])
def test_tensors_of_few_digits_are_averaged_in_float32(dtype: torch.dtype) -> None:
    """A constant 1 of any real dtype averages to 1, however small alpha is."""
    ema = EMA[Tensor](1e-4)
    for _ in range(3000):
        ema.update(torch.ones(2).to(dtype))
    assert ema.get().dtype == torch.float32
    torch.testing.assert_close(ema.get(), torch.ones(2), rtol=1e-4, atol=0)


@given(st.lists(st.tuples(st.floats(1e-4, 1), st.floats(-1e3, 1e3)), min_size=1, max_size=50))
def test_alpha_may_change_between_updates(steps: list[tuple[float, float]]) -> None:
    """Each input weighs its own alpha, less what later ones took from it; the average is the mean with these weights."""
    ema = EMA[float](0.5)
    weights: list[float] = []
    for alpha, x in steps:
        ema.alpha = alpha
        ema.update(x)
        weights = [weight * (1 - alpha) for weight in weights] + [alpha]
    mean = math.fsum(w * x for w, (_, x) in zip(weights, steps, strict=True)) / math.fsum(weights)
    assert ema.get() == pytest.approx(mean, rel=1e-9, abs=1e-8)


def test_an_alpha_of_1_forgets_a_nan() -> None:
    """With an alpha of 1 the newest input is the average, whatever was there."""
    for bad, good in ((math.nan, 2.0), (torch.tensor([math.inf]), torch.tensor([2.0]))):
        ema = EMA[Any](0.5)
        ema.update(bad)
        ema.alpha = 1
        ema.update(good)
        assert ema.get() == good


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (torch.ones(2), torch.ones(1), r"averages tensors of shape \[2\] on cpu, got tensors of shape \[1\]"),
        (torch.ones(2), torch.ones(2, device="meta"), "on cpu, got tensors of shape .* on meta"),
        (torch.ones(2), torch.ones(2, dtype=torch.complex64), "averages tensors .* got complex tensors"),
        (torch.ones(()), 1.0, "averages tensors .* got numbers"),
        (1.0, torch.ones(()), "averages numbers, got tensors"),
        (1.0, "1", "numbers or tensors, got str"),
        (1.0, None, "numbers or tensors, got NoneType"),
        (1.0, 10**400, "numbers or tensors, got int that no float can hold"),
        (torch.ones(2), torch.empty(2, dtype=getattr(torch, "int4")), "compute with, got torch.int4"),  # noqa: B009
        (torch.ones(2), torch.empty(2, dtype=torch.float4_e2m1fn_x2), "compute with, got torch.float4_e2m1fn_x2"),
        (torch.ones(1), [1.0], "numbers or tensors, got list"),
    ],
)
def test_an_input_of_another_kind_is_an_error_and_changes_nothing(first: Any, then: Any, message: str) -> None:
    """What would be broadcast, or could not be averaged, is refused."""
    ema = EMA[Any](0.5)
    ema.update(first)
    with pytest.raises(EmaError, match=message):
        ema.update(then)
    ema.update(first)
    assert (ema.count, ema.get()) == (2, pytest.approx(first))


@pytest.mark.parametrize("name", ["alpha", "count", "weight", "average", None])
@pytest.mark.parametrize("bad", [None, "1", -1, math.nan, 2.5], ids=repr)
def test_a_state_that_is_not_one_changes_nothing(name: str | None, bad: object) -> None:
    """Each field is looked at before any is taken over."""
    ema, other = EMA[float](0.5), EMA[float](0.25)
    for each in (ema, other):
        each.update(3.0)
    before = ema.state_dict()
    state: Any = other.state_dict() | {name: bad} if name else bad
    if (name, bad) in {("average", 2.5), ("average", -1)} or (name == "average" and bad != bad):
        ema.load_state_dict(state)
        return
    with pytest.raises(EmaError, match="state|alpha"):
        ema.load_state_dict(state)
    with pytest.raises(EmaError, match="this one: .*5"):
        ema.load_state_dict(other.state_dict() | {5: 1})  # type: ignore[arg-type]
    with pytest.raises(EmaError, match="averages dense tensors"):
        ema.load_state_dict(other.state_dict() | {"average": torch.eye(2).to_sparse()})
    assert ema.state_dict() == before
    if name:
        with pytest.raises(EmaError, match="this one: "):
            ema.load_state_dict({field: value for field, value in state.items() if field != name})
        assert ema.state_dict() == before


@pytest.mark.parametrize("alpha", [0, 2, math.nan, None, "0.5", True])
def test_a_wrong_alpha_is_refused_later_too(alpha: Any) -> None:
    """Setting it is checked as the constructor checks it."""
    ema = EMA[float](0.5)
    with pytest.raises(EmaError, match="alpha must be above 0 and at most 1"):
        ema.alpha = alpha
    assert ema.alpha == 0.5
