"""What a model may be and an option may say: it works, or an error says at once what to do."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from emaswap import Constant, EmaError, ExponentialRamp, ModelEMA, PowerFunction, Scaled, window


class Optional(nn.Module):
    """A layer with a parameter and a buffer that are not there yet."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_parameter("late", None)
        self.register_buffer("scale", None)


def set_late(model: nn.Module) -> None:
    """Give the parameter its tensor."""
    model.late = nn.Parameter(torch.ones(1))


def set_scale(model: nn.Module) -> None:
    """Give the buffer its tensor."""
    model.scale = torch.ones(1)


def register(model: nn.Module) -> None:
    """Add a parameter."""
    model.register_parameter("more", nn.Parameter(torch.ones(1)))


def add_layer(model: nn.Module) -> None:
    """Add a submodule."""
    model.add_module("layer", nn.Linear(1, 1))


def rename(model: nn.Module) -> None:
    """Exchange a name without a tensor for another."""
    del model.late
    model.register_parameter("more", nn.Parameter(torch.ones(1)))


def take_away(model: nn.Module) -> None:
    """Set a parameter to None."""
    model.weight = None  # type: ignore[assignment]


def reshape(model: nn.Module) -> None:
    """Replace a parameter by a larger one."""
    model.weight = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("updates", [0, 1, 3])
@pytest.mark.parametrize("change", [set_late, set_scale, register, rename, add_layer, take_away, reshape])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "nested"])
def test_state_that_comes_or_goes_is_noticed(
    updates: int, change: Callable[[nn.Module], None], *, wrapped: bool
) -> None:
    """It would not be averaged in silence: the next update says which, and what to do."""
    inner = Optional()
    model = nn.Sequential(inner) if wrapped else inner
    ema = ModelEMA(model)
    for _ in range(updates):
        ema.update(model)
    change(inner)
    with pytest.raises(EmaError, match="(late|scale|more|layer|weight).*; make a ModelEMA of the model as it is now"):
        ema.update(model)


def test_a_tensor_that_is_none_for_good_is_nothing_to_speak_of() -> None:
    """Layers without a bias have such."""
    model = Optional()
    ema = ModelEMA(model)
    assert [ema.update(model) for _ in range(3)] == [True] * 3


def scripted() -> nn.Module:
    """A module of TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(1, 1))


def holding(tensor: torch.Tensor) -> nn.Module:
    """A module with a tensor in a buffer."""
    model = nn.Module()
    model.register_buffer("held", tensor)
    return model


def quantized() -> nn.Module:
    """A module with a quantized tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return holding(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (scripted, "average the module that was scripted"),
        (lambda: nn.Sequential(nn.ReLU(), scripted()), "1 is scripted"),
        (lambda: holding(torch.eye(2).to_sparse()), "held cannot be averaged: its layout is sparse_coo; keep it dense"),
        (lambda: nn.Sequential(holding(torch.eye(2).to_sparse())), "0.held cannot be averaged"),
        (quantized, "average the model before it is quantized"),
        (dict, "expected a torch.nn.Module, got dict"),
        (lambda: holding(torch.eye(2).to_mkldnn()), "its layout is _mkldnn; keep it dense"),
        (lambda: holding(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])), "its layout is nested"),
        (lambda: holding(torch.empty(2, dtype=torch.int4)), "torch cannot compute with int4; keep it out of the state"),  # type: ignore[attr-defined]
        (lambda: holding(torch.empty(2, dtype=torch.float4_e2m1fn_x2)), "torch cannot compute with float4_e2m1fn_x2"),
        (lambda: nn.LazyLinear(2), "run a forward pass before"),
        (lambda: nn.Linear(2, 2, device="meta"), "materialize the model first"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_model_that_cannot_be_averaged_is_refused_at_once(make: Callable[[], nn.Module], advice: str) -> None:
    """The error names the part, and says what to do."""
    with pytest.raises(EmaError, match=advice):
        ModelEMA(make())


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float8_e4m3fn, torch.float32),
        (torch.float8_e5m2, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex32, torch.complex64),
        (torch.complex64, torch.complex64),
        (torch.complex128, torch.complex128),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_of_numbers_is_averaged(dtype: torch.dtype, kept: torch.dtype) -> None:
    """What has few digits is averaged in float32."""
    model = holding(torch.zeros(3).to(dtype))
    ema = ModelEMA(model, Constant(0.5))
    model.held = torch.ones(3).to(dtype)
    assert ema.update(model) is True
    average = ema.ema.state_dict()["held"]
    assert average.dtype == kept
    assert average.tolist() == [0.5] * 3
    model.held = torch.full((3,), math.nan).to(dtype)
    assert ema.update(model) is False


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"buffers": "averge"}, "buffers is one of average, copy, got 'averge'"),
        ({"buffers": True}, "buffers is one of average, copy"),
        ({"update_every": 0}, "update_every is an integer of at least 1, got 0"),
        ({"update_every": 1.5}, "update_every is an integer"),
        ({"update_every": True}, "update_every is an integer"),
        ({"updates": -1}, "updates is an integer of at least 0"),
        ({"updates": "5"}, "updates is an integer of at least 0"),
        ({"decay": "0.9"}, "a decay is a number in .*make_schedule"),
        ({"decay": None}, "a decay is a number"),
        ({"decay": True}, "a decay is a number"),
        ({"decay": 1.5}, "expected a decay in"),
        ({"decay": math.nan}, "expected a decay in"),
        ({"updates": 10**400}, "updates is an integer .* at most 9007199254740992"),
        ({"decay": 10**400}, "a decay is a number in"),
        ({"tau": 10**400}, "tau is a number that a float can hold"),
        ({"tau": "5"}, "tau is a number that a float can hold, got '5'"),
        ({"tau": torch.ones(2)}, "tau is a number that a float can hold"),
        ({"decay": Constant(0.5), "tau": None}, "tau is a number that a float can hold, got None"),
        ({"exclude": 5}, "exclude takes a name or several, got 5"),
        ({"exclude": None}, "exclude takes a name or several, got None"),
        ({"exclude": ["weight", 5]}, "exclude takes a name or several, got 5"),
        ({"variants": {None: 0.5}}, "variants takes a name or several, got None"),
        ({"factory": 5}, "factory is a function that makes another module, got int"),
        ({"factory": nn.Linear(1, 1)}, "factory is a function that makes another module, got Linear"),
        ({"tau": 0}, "tau"),
        ({"tau": -1}, "tau"),
        ({"variants": {"slow": "0.9"}}, "a decay is a number"),
        ({"variants": {"slow": 1.5}}, "expected a decay in"),
        ({"exclude": ["wieght"]}, "exclude='wieght' names nothing"),
        ({"exclude": "wieght"}, "exclude='wieght' names nothing"),
        ({"dtype": torch.int64}, "floating-point dtype of torch of at least 16 bits, got torch.int64"),
        ({"dtype": torch.float8_e5m2}, "floating-point dtype of torch of at least 16 bits, got torch.float8_e5m2"),
        ({"device": "gpu"}, "a device is one of torch's, .* got 'gpu'"),
        ({"device": 3.5}, "a device is one of torch's, .* got 3.5"),
        ({"device": []}, "a device is one of torch's"),
    ],
    ids=str,
)
def test_an_option_that_is_wrong_is_refused_at_once(options: dict[str, Any], advice: str) -> None:
    """The error says what there is to choose from, and what came."""
    with pytest.raises(EmaError, match=advice):
        ModelEMA(nn.Linear(1, 1), **options)


def test_a_single_pattern_need_not_be_in_a_list() -> None:
    """A string is one name, and not its letters."""
    model = nn.Linear(1, 1)
    ema = ModelEMA(model, Constant(1.0), exclude="bias")
    nn.init.constant_(model.bias, 7.0)
    ema.update(model)
    assert ema.ema.state_dict()["bias"].item() == 7.0


def test_what_is_no_state_may_be_anything() -> None:
    """A sparse buffer that is not persistent is left alone."""
    model = nn.Linear(1, 1)
    model.register_buffer("graph", torch.eye(2).to_sparse(), persistent=False)
    assert ModelEMA(model).update(model) is True


# -- a decay that is set -------------------------------------------------------------------------------------------


def test_a_decay_may_be_set_to_a_function() -> None:
    """As scripts written against YOLOv5 do; the average goes by it from then on."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    ema = ModelEMA(model)
    ema.decay = lambda updates: 0.5 if updates == 1 else 0.0
    nn.init.constant_(model.weight, 2.0)
    ema.update(model)
    assert ema.ema.state_dict()["weight"].item() == 1.0
    ema.update(model)
    assert ema.ema.state_dict()["weight"].item() == 2.0
    assert ema.decay.describe() == {"name": "custom"}
    assert ema.decay(1) == 0.5


def test_a_decay_may_be_set_to_a_number_or_a_schedule() -> None:
    """A number holds from then on; it does not begin a ramp anew."""
    ema = ModelEMA(nn.Linear(1, 1), tau=50)
    assert ema.decay == ExponentialRamp(0.9999, 50)
    ema.decay = 0.99
    assert ema.decay == Constant(0.99)
    ema.decay = PowerFunction(6.94)
    assert ema.decay == PowerFunction(6.94)
    with pytest.raises(EmaError, match="a decay is a number"):
        ema.decay = "0.9"  # type: ignore[assignment]
    assert ema.decay == PowerFunction(6.94)


@pytest.mark.parametrize(
    "found",
    [1.5, -0.1, math.nan, None, "x", "0.5", True, [0.5], torch.ones(2), 10**400],
    ids=lambda found: repr(found)[:9],
)
@pytest.mark.parametrize("every", [1, 2])
def test_a_function_that_gives_no_decay_is_an_error(found: object, every: int) -> None:
    """The value is told, and which update it was for; nothing was averaged."""
    model = nn.Linear(1, 1)
    ema = ModelEMA(model, lambda _: found, update_every=every)  # type: ignore[arg-type,return-value]
    before = {name: tensor.clone() for name, tensor in ema.ema.state_dict().items()}
    nn.init.constant_(model.weight, 5.0)
    for _ in range(every - 1):
        ema.update(model)
    with pytest.raises(EmaError, match=r"a decay must be a number in \[0, 1\], and .* gave .* at update 1"):
        ema.update(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.ema.state_dict().items())
    assert ema.updates == every - 1


def test_a_function_that_gives_a_tensor_of_one_number_is_a_decay() -> None:
    """A scalar of torch or numpy is a number."""
    model = nn.Linear(1, 1)
    assert ModelEMA(model, lambda _: torch.tensor(0.5)).update(model) is True  # type: ignore[arg-type,return-value]


def test_an_average_with_a_function_resumes_where_the_same_is_set() -> None:
    """What cannot be made by name says so."""
    model = nn.Linear(1, 1)
    ema, same, other = ModelEMA(model, math.sqrt), ModelEMA(model, math.sqrt), ModelEMA(model)
    ema.decay = lambda _: 0.5
    ema.update(model)
    same.load_state_dict(ema.state_dict())
    assert same.updates == 1
    with pytest.raises(EmaError, match="must be set before the state is loaded"):
        other.load_state_dict(ema.state_dict())


# -- an average as people look at it -------------------------------------------------------------------------------


def test_an_average_can_be_called_and_shown() -> None:
    """It runs as its module does, and says what it is."""
    model = nn.Linear(2, 1)
    ema = ModelEMA(model, Constant(0.75), variants={"slow": Constant(0.9)}, update_every=2)
    rows = torch.randn(3, 2)
    assert torch.equal(ema(rows), ema.ema(rows))
    assert torch.equal(ema(input=rows), ema.ema(rows))
    assert ema.module is ema.ema
    for _ in range(2):
        ema.update(model)
    assert repr(ema) == "ModelEMA(Linear, constant(decay=0.75, window=4), updates=2, update_every=2, variants=['slow'])"
    assert repr(ModelEMA(model)) == "ModelEMA(Linear, exponential_ramp(decay=0.9999, tau=2000), updates=0)"
    assert window(ema.decay(2)) == 4


@pytest.mark.parametrize("to", [(torch.float64,), ("cpu", torch.float64), (torch.ones(1).double(),)], ids=repr)
def test_an_average_can_be_moved(to: tuple[Any, ...]) -> None:
    """As a module is, with its variants and in the midst of its updates; integers stay what they are."""
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    ema = ModelEMA(model, Constant(0.5), variants={"slow": Constant(0.9)})
    ema.update(model)
    assert ema.to(*to) is ema
    for module in (ema.ema, *ema.variants.values()):
        dtypes = {tensor.dtype for tensor in module.state_dict().values()}
        assert dtypes == {torch.float64, torch.int64}
    assert ema.update(model) is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("of_model", [torch.bfloat16, torch.float32], ids=lambda dtype: f"model {dtype}")
def test_an_average_that_is_moved_to_a_device_keeps_its_dtype(dtype: torch.dtype, of_model: torch.dtype) -> None:
    """Only a dtype that is named converts: neither the model's nor the width that is the default."""
    model = nn.Linear(2, 1, dtype=of_model)
    model.register_buffer("wave", torch.tensor([1 + 2j]))
    ema = ModelEMA(model, Constant(0.5), dtype=dtype).to("cpu")
    assert [tensor.dtype for tensor in ema.ema.state_dict().values()] == [dtype, dtype, torch.complex64]
    ema.to(memory_format=torch.channels_last)
    assert ema.ema.state_dict()["wave"].item() == 1 + 2j


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (torch.int64, "at least 16 bits, got torch.int64"),
        (torch.float8_e5m2, "at least 16 bits, got torch.float8_e5m2"),
        ("gpu", "to\\(\\) takes a device, a dtype"),
        ([], "to\\(\\) takes a device, a dtype"),
        ("meta", "the meta device holds no numbers"),
    ],
    ids=str,
)
def test_an_average_cannot_be_moved_to_what_cannot_hold_it(to: Any, message: str) -> None:
    """The error says what there is to move to, and the average stays where it is, as it is."""
    model = nn.Linear(2, 1)
    ema = ModelEMA(model)
    with pytest.raises(EmaError, match=message):
        ema.to(to)
    assert torch.equal(ema.ema.state_dict()["weight"], model.weight)


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: ModelEMA(None), "expected a torch.nn.Module, got NoneType"),  # type: ignore[arg-type]
        (lambda: ModelEMA(nn.Linear(1, 1)).update(None), "expected a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: ModelEMA(nn.Linear(1, 1)).follow(None), "expected a torch.optim.Optimizer"),  # type: ignore[arg-type]
        (lambda: ModelEMA(nn.Linear(1, 1), PowerFunction), "a decay is a number"),  # type: ignore[arg-type]
        (lambda: ModelEMA(nn.Linear(1, 1), variants=["slow"]), "variants are schedules by name"),  # type: ignore[arg-type]
        (lambda: ModelEMA(nn.Linear(1, 1), dtype="float32"), "floating-point dtype of torch"),  # type: ignore[arg-type]
        (lambda: ModelEMA(nn.Linear(1, 1), factory=lambda: None), "expected a torch.nn.Module"),  # type: ignore[arg-type,return-value]
        (lambda: Scaled(0.99, 4), "what is scaled is a schedule"),  # type: ignore[arg-type]
        (lambda: ModelEMA(holding(torch.arange(4).expand(2, -1))), "register a clone"),
    ],
)
def test_what_is_of_another_kind_is_refused_in_words(make: Callable[[], object], advice: str) -> None:
    """A user's mistake is an `EmaError`, and no error of what happens to be called."""
    with pytest.raises(EmaError, match=advice):
        make()


def test_a_factory_that_returns_the_model_is_refused() -> None:
    """Averaging in the model itself would freeze it."""
    model = nn.Linear(1, 1)
    with pytest.raises(EmaError, match="it returned the model itself"):
        ModelEMA(model, factory=lambda: model)
    assert model.weight.requires_grad


def test_numbers_of_numpy_are_numbers() -> None:
    """A decay may come from an array."""
    decay: float = np.float32(0.5)  # type: ignore[assignment]
    assert ModelEMA(nn.Linear(1, 1), decay).decay == ExponentialRamp(0.5, 2000.0)


def test_weights_that_a_narrower_average_cannot_hold_are_left_out() -> None:
    """They would be infinite in it, and NaN for ever after."""
    model = nn.Linear(1, 1)
    ema = ModelEMA(model, Constant(0.5), dtype=torch.float16)
    nn.init.constant_(model.weight, 1e5)
    assert ema.update(model) is False
    nn.init.constant_(model.weight, 1.0)
    assert ema.update(model) is True
    assert all(tensor.isfinite().all() for tensor in ema.ema.state_dict().values())
