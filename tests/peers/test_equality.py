"""ModelEMA against the formulas in float64, and against the averages of other libraries: equal, or different as told.

Lerp forms agree within 1e-5, across forms within 1e-3. What others do at the first update, with buffers, ties, intervals
and half precision is stated by a test each.
"""

import copy
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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
    make_schedule,
)
from tests.models import Everything
from tests.peers.oracle import Recorder, State, assert_close

pytestmark = pytest.mark.peers
some = settings(deadline=None, max_examples=100)


def needs(library: str) -> pytest.MarkDecorator:
    """Skips a test where a library is not installed."""
    return pytest.mark.skipif(not importlib.util.find_spec(library), reason=f"{library} is not installed")


class Shapes(nn.Module):
    """Parameters of these shapes, a floating-point buffer like the first, and an integer one that counts."""

    mean: Tensor
    count: Tensor

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes])
        self.register_buffer("mean", torch.randn(shapes[0]).to(dtype))
        self.register_buffer("count", torch.tensor(0))


@dataclass(frozen=True)
class Stream:
    """The same sequence of models whenever it is asked for."""

    shapes: list[tuple[int, ...]]
    steps: int
    scale: float
    seed: int

    def start(self, dtype: torch.dtype = torch.float32) -> Shapes:
        """The model before its first step."""
        torch.manual_seed(self.seed)
        return Shapes(self.shapes, dtype)

    def run(self, model: Shapes, *after: Callable[[], object]) -> None:
        """A random walk of the model; after each step all of these are called."""
        for _ in range(self.steps):
            with torch.no_grad():
                for tensor in (*model.parameters(), model.mean):
                    tensor.add_((self.scale * torch.randn(tensor.shape)).to(tensor.dtype))
                model.count.add_(1)
            for call in after:
                call()


shapes = st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=4)
streams = st.builds(Stream, shapes, st.integers(1, 40), st.sampled_from([1e-3, 0.1, 3.0]), st.integers(0, 1000))
decays = st.one_of(st.sampled_from([0.0, 0.5, 0.999, 0.9999]), st.floats(0, 0.99999))
warmups = st.fixed_dictionaries({"gamma": st.floats(0.5, 20), "power": st.floats(0.5, 1), "decay": decays})


@dataclass(frozen=True)
class CopyFirst:
    """Another schedule, but the first update takes the weights as they are, and `shift` later ones count as earlier."""

    schedule: Schedule
    shift: int = 0

    def __call__(self, updates: float) -> float:
        return self.schedule(updates - self.shift) if updates > 1 else 0.0

    def describe(self) -> dict[str, str | float]:
        return {"name": "copy_first"}


def parameters_of(average: ModelEMA) -> list[Tensor]:
    """The averaged parameters, in order."""
    return list(average.ema.parameters())


def close(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    """Both lists of tensors are the same within a tolerance."""
    assert len(ours) == len(theirs)
    named = [{str(index): tensor for index, tensor in enumerate(tensors)} for tensors in (ours, theirs)]
    assert_close(named[0], named[1], tolerance)


def floats(state: State) -> State:
    """What of a state is floating-point."""
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def torch_lerp(decay: float) -> Any:
    """torch's averaging function."""
    return get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]


def one_weight(value: float = 1.0, *, frozen: bool = False) -> nn.Module:
    """A module of one weight."""
    return fill_(nn.Linear(1, 1, bias=False), value).requires_grad_(not frozen)


def fill_(module: nn.Module, value: float) -> nn.Module:
    """Set every parameter to a value."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def value_of(module: nn.Module) -> float:
    """The value of the module's first weight."""
    return next(module.parameters()).flatten()[0].item()


# -- the formulas ----------------------------------------------------------------------------------------------------

FORMULAS: dict[str, Callable[[int, dict[str, float]], float]] = {
    "constant": lambda t, p: p["decay"],
    "exponential_ramp": lambda t, p: p["decay"] * (1 - math.exp(-t / p["tau"])),
    "count_ramp": lambda t, p: min(p["decay"], (1 + t) / (10 + t)),
    "inverse_gamma": lambda t, p: min(p["decay"], 1 - (1 + (t - 1) / p["gamma"]) ** -p["power"]),
    "power_function": lambda t, p: (1 - 1 / t) ** (p["gamma"] + 1),
}
parameters = {
    "constant": st.fixed_dictionaries({"decay": decays}),
    "exponential_ramp": st.fixed_dictionaries({"decay": decays, "tau": st.floats(1, 5000)}),
    "count_ramp": st.fixed_dictionaries({"decay": decays}),
    "inverse_gamma": warmups,
    "power_function": st.fixed_dictionaries({"gamma": st.floats(0, 20)}),
}


@pytest.mark.parametrize("name", FORMULAS)
@some
@given(st.data(), streams, st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_each_schedule_is_its_formula(name: str, data: st.DataObject, stream: Stream, dtype: torch.dtype) -> None:
    """Whatever shapes, dtype and parameters: the average is what the formula gives in float64."""
    chosen = data.draw(parameters[name])
    model = stream.start(dtype)
    average = ModelEMA(model, make_schedule(name, **chosen))
    recorder = Recorder(model, lambda t: FORMULAS[name](t, chosen))
    stream.run(model, lambda: average.update(model), recorder.record)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    assert_close(average.ema.state_dict(), recorder.averages[-1], tolerance)


@some
@given(streams, st.integers(1, 7), st.sampled_from([Constant(0.97), CountRamp(0.999), ExponentialRamp(0.999, 50)]))
def test_an_interval_decays_by_the_product(stream: Stream, every: int, schedule: Schedule) -> None:
    """With every k-th model taken in, the decay is the exact product of those of all k updates."""
    model = stream.start()
    average = ModelEMA(model, schedule, update_every=every)

    def span(number: int) -> float:
        return math.prod(schedule(t) for t in range((number - 1) * every + 1, number * every + 1))

    recorder, calls = Recorder(model, span), iter(range(1, stream.steps + 1))

    def record() -> None:
        if next(calls) % every == 0:
            recorder.record()

    stream.run(model, lambda: average.update(model), record)
    assert_close(average.ema.state_dict(), recorder.averages[-1])


@some
@given(streams, decays, st.floats(0.25, 8))
def test_the_scaling_rule(stream: Stream, decay: float, kappa: float) -> None:
    """A batch that is κ times as large has the decay to the power of κ."""
    model = stream.start()
    average = ModelEMA(model, Scaled(Constant(decay), kappa))
    recorder = Recorder(model, lambda _: decay**kappa)
    stream.run(model, lambda: average.update(model), recorder.record)
    assert_close(average.ema.state_dict(), recorder.averages[-1])


@some
@given(streams, st.sampled_from(["average", "copy"]))
def test_variants_are_averages_of_their_own(stream: Stream, buffers: Any) -> None:
    """Averages made in one pass are each what they would be alone."""
    model = stream.start()
    variants: dict[str, Schedule] = {"short": Constant(0.5), "long": PowerFunction(6.94)}
    together = ModelEMA(model, Constant(0.9), variants=variants, buffers=buffers)
    alone = {name: ModelEMA(model, schedule, buffers=buffers) for name, schedule in variants.items()}
    stream.run(model, *(lambda each=each: each.update(model) for each in (together, *alone.values())))
    for name, average in alone.items():
        assert_close(together.variants[name].state_dict(), average.ema.state_dict(), 1e-6)


# -- torch -----------------------------------------------------------------------------------------------------------


@some
@given(streams, decays, st.booleans())
def test_torch_averaged_model(stream: Stream, decay: float, buffers: bool) -> None:
    """torch's `AveragedModel` with its EMA function: the first update copies, then it is a lerp."""
    model = stream.start()
    theirs = AveragedModel(model, multi_avg_fn=torch_lerp(decay), use_buffers=buffers)
    ours = ModelEMA(model, CopyFirst(Constant(decay)), buffers="average" if buffers else "copy")
    stream.run(model, lambda: ours.update(model), lambda: theirs.update_parameters(model))
    assert_close(floats(ours.ema.state_dict()), floats(theirs.module.state_dict()))


def test_torch_blends_integer_buffers_where_we_copy() -> None:
    """With `use_buffers`, torch rounds down a blend of a counter at each update; ModelEMA has the model's own count."""
    stream = Stream([(2,)], steps=20, scale=0.1, seed=0)
    model = stream.start()
    theirs = AveragedModel(model, multi_avg_fn=torch_lerp(0.9), use_buffers=True)
    ours = ModelEMA(model, Constant(0.9))
    stream.run(model, lambda: ours.update(model), lambda: theirs.update_parameters(model))
    assert ours.ema.count == model.count == 20
    assert int(theirs.module.get_buffer("count")) < 20


def test_torch_averages_half_precision_in_half_precision() -> None:
    """At a decay of 0.9999, a bfloat16 average never moves; ours is kept in float32 and goes as it should."""
    model = one_weight().to(torch.bfloat16)
    theirs = AveragedModel(model, multi_avg_fn=torch_lerp(0.9999))
    theirs.update_parameters(model)
    ours = ModelEMA(model, Constant(0.9999))
    fill_(model, 2.0)
    for _ in range(1000):
        theirs.update_parameters(model)
        ours.update(model)
    assert value_of(theirs.module) == 1
    assert value_of(ours.ema) == pytest.approx(2 - 0.9999**1000, rel=1e-5)


# -- timm ------------------------------------------------------------------------------------------------------------


@needs("timm")
@some
@given(streams, decays, st.booleans(), st.booleans())
def test_timm_constant(stream: Stream, decay: float, buffers: bool, foreach: bool) -> None:
    """timm's `ModelEmaV3` without a step: a constant decay, from the first update on."""
    from timm.utils import ModelEmaV3

    model = stream.start()
    theirs = ModelEmaV3(model, decay=decay, exclude_buffers=not buffers, foreach=foreach)
    ours = ModelEMA(model, Constant(decay), buffers="average" if buffers else "copy")
    stream.run(model, lambda: ours.update(model), lambda: theirs.update(model))
    assert_close(ours.ema.state_dict(), theirs.module.state_dict())


@needs("timm")
@some
@given(streams, warmups, st.sampled_from([0.0, 0.2]))
def test_timm_warmup(stream: Stream, warmup: dict[str, float], minimum: float) -> None:
    """timm's warm-up is `InverseGamma`, when its steps are counted from 1."""
    from timm.utils import ModelEmaV3

    model = stream.start()
    decay = max(minimum, warmup["decay"])
    theirs = ModelEmaV3(
        model,
        decay=decay,
        min_decay=minimum,
        use_warmup=True,
        warmup_gamma=warmup["gamma"],
        warmup_power=warmup["power"],
    )
    # The one first copies before its minimum has a say.
    ours = ModelEMA(model, CopyFirst(InverseGamma(**{**warmup, "decay": decay}, minimum=minimum)))
    steps = iter(range(1, stream.steps + 1))
    stream.run(model, lambda: ours.update(model), lambda: theirs.update(model, step=next(steps)))
    assert_close(ours.ema.state_dict(), theirs.module.state_dict())


@needs("timm")
def test_timm_decays_tied_weights_twice_where_we_do_once() -> None:
    """A tensor under two names is averaged for each of them by timm, so its decay is squared."""
    from timm.utils import ModelEmaV3

    model = Everything()
    with torch.no_grad():
        model.encode.weight.fill_(1.0)
    ours, theirs = ModelEMA(model, Constant(0.9)), ModelEmaV3(model, decay=0.9)
    with torch.no_grad():
        model.encode.weight.fill_(0.0)
    ours.update(model)
    theirs.update(model)
    assert ours.ema.get_parameter("encode.weight")[0, 0].item() == pytest.approx(0.9)
    assert theirs.module.encode.weight[0, 0].item() == pytest.approx(0.81)


@needs("timm")
def test_timm_goes_by_position_where_we_go_by_name() -> None:
    """timm averages a model of other names with the same shapes into the wrong tensors; for ModelEMA it is an error."""
    from timm.utils import ModelEmaV3

    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    other = nn.ModuleDict({"b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    ModelEmaV3(model, decay=0.9).update(other)
    with pytest.raises(EmaError, match=r"missing tensor: a\.bias"):
        ModelEMA(model, Constant(0.9)).update(other)


# -- ema-pytorch -----------------------------------------------------------------------------------------------------


@needs("ema_pytorch")
@some
@given(streams, warmups, st.booleans())
def test_ema_pytorch(stream: Stream, warmup: dict[str, float], foreach: bool) -> None:
    """ema-pytorch's `EMA`, updated at each call and without its delay, is `InverseGamma`."""
    from ema_pytorch import EMA

    model = stream.start()
    theirs = EMA(
        model, beta=warmup["decay"], update_after_step=0, update_every=1, inv_gamma=warmup["gamma"],
        power=warmup["power"], use_foreach=foreach,
    )  # fmt: skip
    ours = ModelEMA(model, InverseGamma(**warmup))
    stream.run(model, lambda: ours.update(model), theirs.update)
    assert_close(floats(ours.ema.state_dict()), floats(theirs.ema_model.state_dict()))


@needs("ema_pytorch")
def test_ema_pytorch_does_not_correct_for_its_interval() -> None:
    """With one update in ten calls, ema-pytorch decays as if nine had not been; ModelEMA by the product of all ten."""
    from ema_pytorch import EMA

    model = one_weight()
    theirs = EMA(model, beta=0.9, update_after_step=0, update_every=10, inv_gamma=1e-9, power=1.0)
    theirs.update()  # the first call copies
    ours = ModelEMA(model, Constant(0.9), update_every=10)
    fill_(model, 0.0)
    for _ in range(10):
        theirs.update()
        ours.update(model)
    assert value_of(theirs.ema_model) == pytest.approx(0.9)
    assert value_of(ours.ema) == pytest.approx(0.9**10)


@needs("ema_pytorch")
def test_ema_pytorch_leaves_integer_buffers_as_they_were() -> None:
    """A batch norm's counter stays 0 in ema-pytorch; ModelEMA has the model's."""
    from ema_pytorch import EMA

    stream = Stream([(2,)], steps=5, scale=0.1, seed=0)
    model = stream.start()
    theirs, ours = EMA(model, update_after_step=0, update_every=1), ModelEMA(model)
    stream.run(model, lambda: ours.update(model), theirs.update)
    assert theirs.ema_model.count == 0
    assert ours.ema.count == 5


# -- torch-ema -------------------------------------------------------------------------------------------------------


@needs("torch_ema")
@some
@given(streams, decays, st.booleans())
def test_torch_ema(stream: Stream, decay: float, ramp: bool) -> None:
    """torch-ema's `ExponentialMovingAverage` is `CountRamp`, or constant without its count; of parameters alone."""
    from torch_ema import ExponentialMovingAverage

    model = stream.start()
    theirs = ExponentialMovingAverage(model.parameters(), decay=decay, use_num_updates=ramp)
    ours = ModelEMA(model, CountRamp(decay) if ramp else Constant(decay))
    stream.run(model, lambda: ours.update(model), theirs.update)
    close(parameters_of(ours), theirs.shadow_params)


# -- diffusers -------------------------------------------------------------------------------------------------------


@needs("diffusers")
@some
@given(streams, warmups, st.booleans(), st.booleans())
def test_diffusers(stream: Stream, warmup: dict[str, float], with_warmup: bool, foreach: bool) -> None:
    """diffusers' `EMAModel` is `InverseGamma`; without its warm-up, `CountRamp` one update later, after a copy."""
    from diffusers.training_utils import EMAModel

    model = stream.start()
    theirs = EMAModel(
        model.parameters(), decay=warmup["decay"], use_ema_warmup=with_warmup, inv_gamma=warmup["gamma"],
        power=warmup["power"], foreach=foreach,
    )  # fmt: skip
    schedule = InverseGamma(**warmup) if with_warmup else CopyFirst(CountRamp(warmup["decay"]), shift=1)
    ours = ModelEMA(model, schedule)
    stream.run(model, lambda: ours.update(model), lambda: theirs.step(model.parameters()))
    close(parameters_of(ours), theirs.shadow_params)


@needs("diffusers")
def test_diffusers_copies_what_is_frozen_where_we_average() -> None:
    """A parameter without gradients that changes all the same is copied by diffusers; ModelEMA copies what it is told to."""
    from diffusers.training_utils import EMAModel

    model = one_weight(frozen=True)
    theirs = EMAModel(model.parameters(), update_after_step=-10)
    averaged, told = ModelEMA(model, Constant(0.9)), ModelEMA(model, Constant(0.9), exclude=("weight",))
    fill_(model, 0.0)
    theirs.step(model.parameters())
    averaged.update(model)
    told.update(model)
    assert theirs.shadow_params[0].item() == value_of(told.ema) == 0
    assert value_of(averaged.ema) == pytest.approx(0.9)


# -- YOLOv5 ----------------------------------------------------------------------------------------------------------


class MultiplyAdd:
    """The interface and arithmetic described for YOLOv5's average: each state entry times d, plus 1−d times the model's."""

    def __init__(self, model: nn.Module, decay: float = 0.9999, tau: float = 2000) -> None:
        self.state = {name: tensor.clone() for name, tensor in copy.deepcopy(model).state_dict().items()}
        self.ramp, self.updates = (decay, tau), 0

    def update(self, model: nn.Module) -> None:
        """One more update."""
        self.updates += 1
        decay, tau = self.ramp
        d = decay * (1 - math.exp(-self.updates / tau))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.state[name].mul_(d).add_(tensor, alpha=1 - d)


@some
@given(streams, decays, st.floats(1, 5000))
def test_yolov5(stream: Stream, decay: float, tau: float) -> None:
    """The average of YOLOv5, over the whole floating-point state; it multiplies and adds, so that it rounds otherwise."""
    model = stream.start()
    ours, theirs = ModelEMA(model, decay, tau), MultiplyAdd(model, decay, tau)
    stream.run(model, lambda: ours.update(model), lambda: theirs.update(model))
    assert_close(floats(ours.ema.state_dict()), floats(theirs.state), tolerance=1e-3)


def test_a_lerp_rounds_less_than_multiplying_and_adding() -> None:
    """In float32, 5,000 updates at a decay of 0.9999 are off by less than 1e-5 as lerps, and by more as products."""
    model = one_weight(0.0)
    ours, theirs = ModelEMA(model, Constant(0.9999)), MultiplyAdd(model, 0.9999, tau=1e-9)
    fill_(model, 1.0)
    for _ in range(5000):
        ours.update(model)
        theirs.update(model)
    expected = 1 - 0.9999**5000
    errors = [abs(average / expected - 1) for average in (value_of(ours.ema), theirs.state["weight"].item())]
    assert errors[0] < 1e-5 < errors[1] < 1e-3


# -- what the first update does --------------------------------------------------------------------------------------


def _timm(model: nn.Module, step: int | None) -> nn.Module:
    from timm.utils import ModelEmaV3

    theirs = ModelEmaV3(model, decay=0.9999, use_warmup=True)
    fill_(model, 0.0)
    theirs.update(model, step=step)
    module: nn.Module = theirs.module
    return module


def _torch(model: nn.Module) -> nn.Module:
    theirs = AveragedModel(model, multi_avg_fn=torch_lerp(0.9999))
    fill_(model, 0.0)
    theirs.update_parameters(model)
    return theirs.module


def _ema_pytorch(model: nn.Module) -> nn.Module:
    from ema_pytorch import EMA

    theirs = EMA(model)
    fill_(model, 0.0)
    theirs.update()
    module: nn.Module = theirs.ema_model
    return module


def _shadow(theirs: Any, model: nn.Module, update: str) -> nn.Module:
    fill_(model, 0.0)
    getattr(theirs, update)(model.parameters())
    theirs.copy_to(model.parameters())
    return model


def _torch_ema(model: nn.Module) -> nn.Module:
    from torch_ema import ExponentialMovingAverage

    return _shadow(ExponentialMovingAverage(model.parameters(), decay=0.9999), model, "update")


def _diffusers(model: nn.Module) -> nn.Module:
    from diffusers.training_utils import EMAModel

    return _shadow(EMAModel(model.parameters()), model, "step")


def _ours(*arguments: Any) -> Callable[[nn.Module], nn.Module]:
    def first_update(model: nn.Module) -> nn.Module:
        ours = ModelEMA(model, *arguments)
        fill_(model, 0.0)
        ours.update(model)
        return ours.ema

    return first_update


@pytest.mark.parametrize(
    ("first_update", "left"),
    [
        pytest.param(_ours(), 0.9999 * (1 - math.exp(-1 / 2000)), id="ModelEMA, as YOLOv5"),
        pytest.param(_ours(Constant(0.9999)), 0.9999, id="ModelEMA, constant"),
        pytest.param(_ours(CountRamp()), 2 / 11, id="ModelEMA, count ramp"),
        pytest.param(_ours(InverseGamma()), 0, id="ModelEMA, inverse gamma"),
        pytest.param(_ours(PowerFunction(6.94)), 0, id="ModelEMA, power function"),
        pytest.param(_torch, 0, id="torch"),
        pytest.param(lambda model: _timm(model, None), 0.9999, id="timm, no step", marks=needs("timm")),
        pytest.param(lambda model: _timm(model, 1), 0, id="timm, step 1", marks=needs("timm")),
        pytest.param(lambda model: _timm(model, 2), 1 - 2 ** (-2 / 3), id="timm, step 2", marks=needs("timm")),
        pytest.param(_ema_pytorch, 0, id="ema-pytorch", marks=needs("ema_pytorch")),
        pytest.param(_torch_ema, 2 / 11, id="torch-ema", marks=needs("torch_ema")),
        pytest.param(_diffusers, 0, id="diffusers", marks=needs("diffusers")),
    ],
)
def test_the_first_update(first_update: Callable[[nn.Module], nn.Module], left: float) -> None:
    """What is left of a weight of 1 when the first update says 0, by whose average it is."""
    assert value_of(first_update(one_weight())) == pytest.approx(left, rel=1e-4, abs=1e-7)
