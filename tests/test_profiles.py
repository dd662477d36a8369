"""Several averages in one pass, intervals between updates, and what is averaged, copied or converted."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from emaswap import Constant, CountRamp, EmaError, ExponentialRamp, InverseGamma, ModelEMA, PowerFunction, Schedule
from tests.models import Everything
from tests.test_ema_traps import assert_same, state_of

SCHEDULES: list[Schedule] = [
    Constant(0.9),
    ExponentialRamp(0.99, 20),
    CountRamp(0.99),
    InverseGamma(0.99),
    PowerFunction.from_sigma_rel(0.1),
]
PROFILES: dict[str, Schedule] = {"short": Constant(0.5), "power": PowerFunction(6.94)}


def drift_(module: nn.Module) -> None:
    """One step of a random walk of all parameters and buffers."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor))
            else:
                tensor.add_(1)


class Zoo(nn.Module):
    """Tensors of every kind that matters to a pass in slices."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.randn(50, 7))
        self.image = nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
        self.turned = nn.Parameter(torch.randn(6, 9).t())
        self.gaps = nn.Parameter(torch.randn(8, 8)[::2, ::2])
        self.wave = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.precise = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.nothing = nn.Parameter(torch.randn(0, 3))
        self.tied = self.large
        self.norm = nn.BatchNorm1d(4)


@pytest.mark.parametrize("slice_size", [1, 16, 1 << 20])
def test_profiles_equal_as_many_averages_to_the_last_bit(monkeypatch: pytest.MonkeyPatch, slice_size: int) -> None:
    """However the tensors are cut and grouped, each profile is what a `ModelEMA` of its own would be."""
    monkeypatch.setattr("emaswap.plan._SLICE", slice_size)
    torch.manual_seed(0)
    model = Zoo()
    together = ModelEMA(model, Constant(0.9), profiles=PROFILES)
    apart = {"": ModelEMA(model, Constant(0.9))} | {name: ModelEMA(model, each) for name, each in PROFILES.items()}
    for _ in range(4):
        drift_(model)
        together.update(model)
        for ema in apart.values():
            ema.update(model)
    for name, module in {"": together.ema, **together.profiles}.items():
        assert_same(module, state_of(apart[name].ema))
    assert together.ema.state_dict()["image"].is_contiguous(memory_format=torch.channels_last)


@given(
    st.sampled_from(SCHEDULES), st.integers(1, 5), st.integers(1, 23), st.sampled_from([torch.float32, torch.float64])
)
@settings(deadline=None, max_examples=60)
def test_an_interval_uses_the_product_of_the_decays_between(
    schedule: Schedule, every: int, updates: int, dtype: torch.dtype
) -> None:
    """Against the formula in double precision, whatever the schedule and the interval."""
    torch.manual_seed(updates)
    model = nn.Linear(3, 2, dtype=dtype)
    ema = ModelEMA(model, schedule, update_every=every)
    expected = model.weight.detach().double().clone()
    for number in range(1, updates + 1):
        drift_(model)
        assert ema.update(model) is (number % every == 0)
        if number % every == 0:
            decay = math.prod(schedule(each) for each in range(number - every + 1, number + 1))
            expected = decay * expected + (1 - decay) * model.weight.detach().double()
    assert ema.updates == updates
    torch.testing.assert_close(ema.ema.state_dict()["weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_buffers_can_be_copied_and_names_left_out() -> None:
    """`buffers="copy"` and `exclude` take weights as they are; all else is averaged."""
    torch.manual_seed(0)
    model = Zoo()
    ema = ModelEMA(model, Constant(0.5), buffers="copy", exclude=["prec*", "image"])
    start = state_of(model)
    drift_(model)
    ema.update(model)
    now, average = state_of(model), state_of(ema.ema)
    copied = {name for name in now if torch.equal(now[name], average[name]) and now[name].numel()}
    assert copied == {"precise", "image", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    torch.testing.assert_close(average["large"], (start["large"] + now["large"]) / 2)


def test_half_precision_is_averaged_in_float32_unless_told_otherwise() -> None:
    """A bfloat16 average with a long memory would never move."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(model.weight, 1.0)
    wide, narrow = ModelEMA(model, Constant(0.9999)), ModelEMA(model, Constant(0.9999), dtype=torch.bfloat16)
    nn.init.constant_(model.weight, 2.0)
    for ema in (wide, narrow):
        for _ in range(10):
            ema.update(model)
    assert wide.ema.state_dict()["weight"].item() == pytest.approx(2 - 0.9999**10)
    assert narrow.ema.state_dict()["weight"].item() == 1.0
    assert ModelEMA(Zoo(), dtype=torch.float64).ema.state_dict()["large"].dtype == torch.float64


def test_an_interval_below_1_is_an_error() -> None:
    """The message says what came."""
    with pytest.raises(EmaError, match="at least 1, got 0"):
        ModelEMA(nn.Linear(1, 1), update_every=0)


def test_a_profile_can_be_swapped_into_the_model() -> None:
    """By its name; an unknown one is an error that names those there are."""
    torch.manual_seed(0)
    model = Everything()
    ema = ModelEMA(model, profiles=PROFILES)
    for _ in range(3):
        drift_(model)
        ema.update(model)
    own = state_of(model)
    with ema.swapped_into(model, "short"):
        assert_same(model, state_of(ema.profiles["short"]))
    assert_same(model, own)
    with pytest.raises(EmaError, match="no profile 'long': there are short, power"), ema.swapped_into(model, "long"):
        pass


# -- going on ------------------------------------------------------------------------------------------------------


def _pickled(ema: ModelEMA) -> ModelEMA:
    again = pickle.loads(pickle.dumps(ema))
    assert isinstance(again, ModelEMA)
    return again


def _loaded(ema: ModelEMA) -> ModelEMA:
    again = ModelEMA(Everything(), Constant(0.1), profiles=dict.fromkeys(PROFILES, Constant(0.1)))
    again.load_state_dict(copy.deepcopy(ema.state_dict()))
    return again


@pytest.mark.parametrize("again", [_pickled, copy.deepcopy, _loaded])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.describe()["schedule"])
def test_it_goes_on_in_the_middle_of_an_interval(again: Callable[[ModelEMA], ModelEMA], schedule: Schedule) -> None:
    """Profiles, schedules, counts and the updates since the last interval all come along."""
    torch.manual_seed(0)
    model = Everything()
    first = ModelEMA(model, schedule, profiles=PROFILES, update_every=3)
    for _ in range(4):
        drift_(model)
        first.update(model)
    second = again(first)
    for _ in range(2):
        drift_(model)
        assert first.update(model) is second.update(model)
    assert (second.updates, second.update_every, second.decay) == (6, 3, schedule)
    assert_same(second.ema, state_of(first.ema))
    for name, module in first.profiles.items():
        assert_same(second.profiles[name], state_of(module))


class Halving:
    """A schedule of somebody's own."""

    def __call__(self, updates: float) -> float:
        return 0.5

    def describe(self) -> dict[str, str | float]:
        return {"schedule": "halving"}


def test_what_cannot_be_taken_over_is_an_error() -> None:
    """Other profiles, or a schedule that cannot be made by its name and was not given."""
    model = nn.Linear(2, 2)
    own = ModelEMA(model, Halving())
    ModelEMA(model, Halving()).load_state_dict(own.state_dict())
    with pytest.raises(EmaError, match="halving"):
        ModelEMA(model).load_state_dict(own.state_dict())
    with pytest.raises(EmaError, match=r"profiles \['short'\], this average \[\]"):
        ModelEMA(model).load_state_dict(ModelEMA(model, profiles={"short": Constant(0.5)}).state_dict())


def test_attributes_go_to_every_average() -> None:
    """`update_attr` reaches the profiles, too."""
    model = nn.Linear(2, 2)
    ema = ModelEMA(model, profiles=PROFILES)
    model.names = ["cat"]  # type: ignore[assignment]
    ema.update_attr(model, include=["names"])
    modules: list[nn.Module] = [ema.ema, *ema.profiles.values()]
    assert all(vars(module)["names"] == ["cat"] for module in modules)


def test_averages_live_where_they_are_told_to() -> None:
    """An average on another device follows across it; "meta" stands for one where there is a single real one."""
    model = nn.Linear(2, 2)
    ema = ModelEMA(model, device="meta", guard=False)
    tensors: list[Tensor] = list(ema.ema.state_dict().values())
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert ema.update(model) is True
