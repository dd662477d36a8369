"""Several averages in one pass, intervals between updates, and what is averaged, copied or converted."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from emaswap import (
    Constant,
    CountRamp,
    EmaError,
    ExponentialRamp,
    InverseGamma,
    ModelEMA,
    PowerFunction,
    Scaled,
    Schedule,
)
from tests.averaging.test_ema_traps import assert_same, one, state_of, weight_of
from tests.models import Everything

SCHEDULES: list[Schedule] = [
    Constant(0.9),
    ExponentialRamp(0.99, 20),
    CountRamp(0.99),
    InverseGamma(0.99),
    PowerFunction.from_sigma_rel(0.1),
    Scaled(ExponentialRamp(0.99, 20), 4.0),
]
VARIANTS: dict[str, Schedule] = {"short": Constant(0.5), "power": PowerFunction(6.94)}


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
def test_variants_equal_as_many_averages_to_the_last_bit(monkeypatch: pytest.MonkeyPatch, slice_size: int) -> None:
    """However the tensors are cut and grouped, each variant is what a `ModelEMA` of its own would be."""
    monkeypatch.setattr("emaswap.averaging.plan._SLICE", slice_size)
    torch.manual_seed(0)
    model = Zoo()
    together = ModelEMA(model, Constant(0.9), variants=VARIANTS)
    apart = {"": ModelEMA(model, Constant(0.9))} | {name: ModelEMA(model, each) for name, each in VARIANTS.items()}
    for _ in range(4):
        drift_(model)
        together.update(model)
        for ema in apart.values():
            ema.update(model)
    for name, module in {"": together.ema, **together.variants}.items():
        assert_same(module, state_of(apart[name].ema))
    assert together.ema.state_dict()["image"].is_contiguous(memory_format=torch.channels_last)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.int64, torch.bool]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "turned": lambda tensor: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor,
    "gaps": lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0],
}


@st.composite
def modules(draw: st.DrawFn) -> nn.Module:
    """Some tensors of any dtype, shape and layout, parameters and buffers, some of them tied."""
    module = nn.Module()
    for number in range(draw(st.integers(1, 5))):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        tensor = torch.ones(shape, dtype=draw(st.sampled_from(DTYPES)))
        tensor = draw(st.sampled_from(list(LAYOUTS.values())))(tensor)
        if draw(st.booleans()) and (tensor.is_floating_point() or tensor.is_complex()):
            module.register_parameter(f"t{number}", nn.Parameter(tensor))
            if draw(st.booleans()):
                module.register_parameter(f"tied{number}", module.get_parameter(f"t{number}"))
        else:
            module.register_buffer(f"t{number}", tensor)
    return module


def random_(module: nn.Module) -> None:
    """Other numbers in every tensor, of any dtype."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape).mul(10))


@settings(deadline=None, max_examples=60)
@given(modules(), st.integers(1, 40), st.sampled_from([None, torch.float32, torch.float64]), st.integers(1, 3))
def test_any_module_has_the_variants_that_as_many_averages_would_have(
    model: nn.Module, slice_size: int, dtype: torch.dtype | None, every: int
) -> None:
    """Whatever the tensors are, wherever they are cut, and into which dtype they are averaged: the same bits."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emaswap.averaging.plan._SLICE", slice_size)
        together = ModelEMA(model, Constant(0.9), variants=VARIANTS, dtype=dtype, update_every=every)
        apart = {
            name: ModelEMA(model, schedule, dtype=dtype, update_every=every)
            for name, schedule in {"": Constant(0.9), **VARIANTS}.items()
        }
        for _ in range(4):
            random_(model)
            for ema in (together, *apart.values()):
                ema.update(model)
    for name, module in {"": together.ema, **together.variants}.items():
        assert_same(module, state_of(apart[name].ema))


@settings(deadline=None, max_examples=80)
@given(
    modules(),
    st.lists(st.one_of(st.just(0.0), st.floats(1e-4, 1), st.just(0.5), st.just(1.0)), min_size=3, max_size=3),
    st.sampled_from([None, torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
)
def test_the_pass_that_minds_a_flag_on_the_device_is_the_plain_one_or_nothing(
    model: nn.Module, weights: list[float], dtype: torch.dtype | None, found: bool
) -> None:
    """`run_unless` takes any tensors, weights and dtypes, and does what `run` does, unless the flag forbids it."""
    torch.manual_seed(0)
    random_(model)
    ema, other = (ModelEMA(model, variants=VARIANTS, dtype=dtype) for _ in range(2))
    random_(model)
    before = [state_of(module) for module in (ema.ema, *ema.variants.values())]
    with torch.no_grad():
        ema._planned(model).run_unless(torch.tensor([float(found)]), weights)
        other._planned(model).run(weights)
    for module, plain, unchanged in zip(
        (ema.ema, *ema.variants.values()), (other.ema, *other.variants.values()), before, strict=True
    ):
        if found:
            assert_same(module, unchanged)
        else:
            for mine, expected in zip(module.state_dict().values(), plain.state_dict().values(), strict=True):
                # From a sum that nearly cancels, rounding is as large as that of what was added.
                precision = torch.finfo(mine.dtype).eps if mine.is_floating_point() or mine.is_complex() else 0
                torch.testing.assert_close(mine, expected, rtol=2 * precision, atol=100 * precision)


def test_an_empty_tensor_may_come_first() -> None:
    """A layer without inputs has weights, too: none."""
    model = nn.ParameterList([nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.zeros(2))])
    ema = ModelEMA(model, Constant(0.5), variants=VARIANTS)
    nn.init.ones_(model[1])
    assert ema.update(model) is True
    assert ema.ema.state_dict()["1"].tolist() == [0.5, 0.5]


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.text("abc", min_size=1), st.sampled_from(SCHEDULES), max_size=3), st.integers(1, 4))
def test_every_variant_follows_the_formula_of_its_own_schedule(variants: dict[str, Schedule], every: int) -> None:
    """Against double precision, each with the product of its own decays over an interval."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    schedules = {"": Constant(0.99), **variants}
    ema = ModelEMA(model, schedules[""], variants=variants, update_every=every)
    expected = dict.fromkeys(schedules, model.weight.detach().double())
    for end in range(every, 24, every):
        for _ in range(every):
            drift_(model)
            ema.update(model)
        for name, schedule in schedules.items():
            decay = math.prod(schedule(number) for number in range(end - every + 1, end + 1))
            expected[name] = decay * expected[name] + (1 - decay) * model.weight.detach().double()
    for name, module in {"": ema.ema, **ema.variants}.items():
        torch.testing.assert_close(module.state_dict()["weight"].double(), expected[name], rtol=1e-5, atol=1e-5)


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


def test_an_interval_that_begins_late_goes_on_with_the_count_it_was_given() -> None:
    """`updates` counts those before: the first interval has the decays that come after them."""
    model = one(0.0)
    ema = ModelEMA(model, CountRamp(), updates=10, update_every=2)
    nn.init.ones_(model.weight)
    assert [ema.update(model), ema.update(model)] == [False, True]
    assert weight_of(ema.ema) == pytest.approx(1 - (12 / 21) * (13 / 22))


def test_an_interval_whose_end_is_left_out_ends_with_the_next_step() -> None:
    """The decays of all steps since the last interval are in it, that of the step left out apart."""
    model = one(0.0)
    ema = ModelEMA(model, Constant(0.5), update_every=3)
    made = []
    for value in (1.0, 1.0, float("nan"), 1.0, 1.0):
        nn.init.constant_(model.weight, value)
        made.append(ema.update(model))
    assert made == [False, False, False, True, False]
    assert (ema.updates, ema.skipped) == (4, 1)
    assert weight_of(ema.ema) == 1 - 0.5**3


def test_an_interval_below_1_is_an_error() -> None:
    """The message says what came."""
    with pytest.raises(EmaError, match="at least 1, got 0"):
        ModelEMA(nn.Linear(1, 1), update_every=0)


def test_a_variant_can_be_swapped_into_the_model() -> None:
    """By its name; an unknown one is an error that names those there are."""
    torch.manual_seed(0)
    model = Everything()
    ema = ModelEMA(model, variants=VARIANTS)
    for _ in range(3):
        drift_(model)
        ema.update(model)
    own = state_of(model)
    with ema.swapped_into(model, "short"):
        assert_same(model, state_of(ema.variants["short"]))
    assert_same(model, own)
    with pytest.raises(EmaError, match="no variant 'long': there are short, power"), ema.swapped_into(model, "long"):
        pass


@pytest.mark.parametrize("variant", [None, "short", "power"])
def test_a_wide_average_is_swapped_into_a_narrow_model(variant: str | None) -> None:
    """In the block a bfloat16 model has the average rounded to it, and after it its own bits."""
    torch.manual_seed(0)
    model = Zoo().bfloat16()
    ema = ModelEMA(model, Constant(0.9), variants=VARIANTS)
    for _ in range(3):
        drift_(model)
        ema.update(model)
    own = state_of(model)
    average = ema.ema if variant is None else ema.variants[variant]
    with ema.swapped_into(model, variant):
        assert_same(model, {name: tensor.to(own[name].dtype) for name, tensor in state_of(average).items()})
    assert_same(model, own)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_is_swapped_inside_its_wrapper(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """What the wrapper computes inside the block is what the average computes."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    wrapper = wrap(model)
    ema = ModelEMA(wrapper, Constant(0.5))
    drift_(model)
    ema.update(wrapper)
    rows = torch.randn(4, 3)
    with torch.no_grad():
        own = wrapper(rows)
        with ema.swapped_into(wrapper):
            assert torch.equal(wrapper(rows), ema.ema(rows))
        assert torch.equal(wrapper(rows), own)
    assert not torch.equal(ema.ema(rows), own)


# -- going on ------------------------------------------------------------------------------------------------------


def _pickled(ema: ModelEMA) -> ModelEMA:
    again = pickle.loads(pickle.dumps(ema))
    assert isinstance(again, ModelEMA)
    return again


def _loaded(ema: ModelEMA) -> ModelEMA:
    again = ModelEMA(Everything(), Constant(0.1), variants=dict.fromkeys(VARIANTS, Constant(0.1)))
    again.load_state_dict(copy.deepcopy(ema.state_dict()))
    return again


@pytest.mark.parametrize("again", [_pickled, copy.deepcopy, _loaded])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.describe()["name"])
def test_it_goes_on_in_the_middle_of_an_interval(again: Callable[[ModelEMA], ModelEMA], schedule: Schedule) -> None:
    """Variants, schedules, counts and the updates since the last interval all come along."""
    torch.manual_seed(0)
    model = Everything()
    first = ModelEMA(model, schedule, variants=VARIANTS, update_every=3)
    for _ in range(4):
        drift_(model)
        first.update(model)
    second = again(first)
    for _ in range(2):
        drift_(model)
        assert first.update(model) is second.update(model)
    assert (second.updates, second.update_every, second.decay) == (6, 3, schedule)
    assert_same(second.ema, state_of(first.ema))
    for name, module in first.variants.items():
        assert_same(second.variants[name], state_of(module))


class Halving:
    """A schedule of somebody's own."""

    def __call__(self, updates: float) -> float:
        return 0.5

    def describe(self) -> dict[str, str | float]:
        return {"name": "halving"}


@pytest.mark.parametrize("again", [_pickled, copy.deepcopy])
def test_a_schedule_of_ones_own_goes_along(again: Callable[[ModelEMA], ModelEMA]) -> None:
    """It is a variant like any other, in a copy too, as long as the class can be found."""
    model = one(0.0)
    ema = again(ModelEMA(model, Constant(0.9), variants={"own": Halving()}))
    nn.init.ones_(model.weight)
    ema.update(model)
    assert weight_of(ema.variants["own"]) == 0.5


def test_what_was_left_out_is_still_counted_after_loading() -> None:
    """`skipped` is part of the state."""
    model = one(1.0)
    first, second = (ModelEMA(model, Constant(0.5)) for _ in range(2))
    nn.init.constant_(model.weight, float("nan"))
    first.update(model)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert (second.updates, second.skipped) == (0, 1)


def test_a_state_that_is_refused_changes_nothing() -> None:
    """Neither counts nor schedules nor weights are taken from a state of other variants."""
    model = one(1.0)
    ema = ModelEMA(model, Constant(0.5), updates=3)
    nn.init.constant_(model.weight, 2.0)
    with pytest.raises(EmaError):
        ema.load_state_dict(ModelEMA(model, Constant(0.9), updates=7, variants=VARIANTS).state_dict())
    assert (ema.updates, ema.decay, weight_of(ema.ema)) == (3, Constant(0.5), 1.0)


@pytest.mark.parametrize("spoilt", ["ema", "short"])
@pytest.mark.parametrize(
    "spoil", [lambda state: state.pop("bias"), lambda state: state.update(bias=torch.ones(3))], ids=["missing", "shape"]
)
def test_tensors_that_are_refused_leave_all_as_it_was(spoilt: str, spoil: Callable[[dict[str, Any]], object]) -> None:
    """A state that lacks a tensor of one average, or has it in another shape, is taken into none."""
    model = nn.Linear(2, 2)
    ema = ModelEMA(model, Constant(0.5), updates=3, variants=VARIANTS)
    other = ModelEMA(nn.Linear(2, 2), Constant(0.9), updates=7, variants=VARIANTS)
    before, state = copy.deepcopy(ema.state_dict()), other.state_dict()
    spoil(state["ema"] if spoilt == "ema" else state["variants"][spoilt]["ema"])
    with pytest.raises(EmaError, match=r"(?s)not of this average: .*bias"):
        ema.load_state_dict(state)
    assert repr(ema.state_dict()) == repr(before)


def test_what_cannot_be_taken_over_is_an_error() -> None:
    """Other variants, or a schedule that cannot be made by its name and was not given."""
    model = nn.Linear(2, 2)
    own = ModelEMA(model, Halving())
    ModelEMA(model, Halving()).load_state_dict(own.state_dict())
    with pytest.raises(EmaError, match="halving"):
        ModelEMA(model).load_state_dict(own.state_dict())
    with pytest.raises(EmaError, match=r"variants \['short'\], this average \[\]"):
        ModelEMA(model).load_state_dict(ModelEMA(model, variants={"short": Constant(0.5)}).state_dict())


def test_attributes_go_to_every_average() -> None:
    """`update_attr` reaches the variants, too."""
    model = nn.Linear(2, 2)
    ema = ModelEMA(model, variants=VARIANTS)
    model.names = ["cat"]  # type: ignore[assignment]
    ema.update_attr(model, include=["names"])
    modules: list[nn.Module] = [ema.ema, *ema.variants.values()]
    assert all(vars(module)["names"] == ["cat"] for module in modules)


def test_averages_live_where_they_are_told_to() -> None:
    """An average on another device follows across it; "meta" stands for one where there is a single real one."""
    model = nn.Linear(2, 2)
    ema = ModelEMA(model, device="meta", guard=False)
    tensors: list[Tensor] = list(ema.ema.state_dict().values())
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert ema.update(model) is True
