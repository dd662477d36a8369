"""The average of a module's weights."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from emaswap import Constant, EmaError, ExponentialRamp, ModelEMA
from tests.models import Everything


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test."""
    torch.manual_seed(0)


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def drift_(module: nn.Module, by: float = 0.1) -> None:
    """One step of a random walk of all parameters and floating-point buffers."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(by * torch.randn_like(tensor))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's state."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(module: nn.Module, expected: dict[str, Tensor]) -> None:
    """The module's state is just the one expected."""
    torch.testing.assert_close(dict(module.state_dict()), expected, rtol=0, atol=0)


# -- ModelEMA: the numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parameters", "with batch norm"])
def test_the_average_follows_the_formula_over_5000_updates(kind: str) -> None:
    """Against d_t = decay·(1 - e^(-t/tau)), e = d·e + (1-d)·m in fp64, the fp32 average stays within 1e-5."""
    model = nn.Sequential(nn.Linear(3, 4), *([nn.BatchNorm1d(4)] if kind == "with batch norm" else []))
    ema = ModelEMA(model, decay=0.9999, tau=2000)
    floats = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    expected = {name: tensor.double() for name, tensor in floats.items()}
    for t in range(1, 5001):
        drift_(model, 0.05)
        ema.update(model)
        d = 0.9999 * (1 - math.exp(-t / 2000))
        for name, tensor in floats.items():
            expected[name] = d * expected[name] + (1 - d) * tensor.double()
    for name, tensor in expected.items():
        torch.testing.assert_close(ema.ema.state_dict()[name].double(), tensor, rtol=1e-5, atol=1e-5)


def test_the_first_update_has_the_decay_of_count_1() -> None:
    """The counter goes up first: the first update keeps 0.9999·(1 - e^(-1/2000)) = 0.00049983 of the old weights."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = ModelEMA(model)
    nn.init.constant_(model.weight, 0.0)
    ema.update(model)
    assert ema.updates == 1
    assert ema.ema.state_dict()["weight"].item() == pytest.approx(0.0004998250, abs=1e-7)


def test_any_schedule_sets_the_decay() -> None:
    """A schedule of one's own takes the place of the ramp."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = ModelEMA(model, decay=Constant(0.75))
    nn.init.constant_(model.weight, 0.0)
    ema.update(model)
    assert ema.ema.state_dict()["weight"].item() == 0.75


def test_an_average_of_bf16_weights_in_fp32_moves() -> None:
    """An average turned to fp32 follows a bf16 model in steps that bf16 itself could not take."""
    model = nn.Linear(4, 4, bias=False).bfloat16()
    nn.init.constant_(model.weight, 1.0)
    ema = ModelEMA(model, decay=Constant(0.9999))
    ema.ema.float()
    nn.init.constant_(model.weight, 2.0)
    for _ in range(100):
        ema.update(model)
    average = ema.ema.state_dict()["weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full((4, 4), 2 - 0.9999**100))


# -- ModelEMA: what a state is made of -----------------------------------------------------------------------------


def test_integer_buffers_are_copied_not_blended() -> None:
    """The average's counters are the model's own."""
    model = nn.BatchNorm1d(2)
    ema = ModelEMA(model, decay=Constant(0.9))
    for _ in range(3):
        model(torch.randn(4, 2))
        ema.update(model)
    counter = ema.ema.state_dict()["num_batches_tracked"]
    assert (counter.dtype, counter.item()) == (torch.int64, 3)


def test_floating_point_buffers_are_averaged() -> None:
    """Running statistics are averaged as the weights are."""
    model = nn.BatchNorm1d(2)
    ema = ModelEMA(model, decay=Constant(0.75))
    model.state_dict()["running_mean"].fill_(4.0)
    ema.update(model)
    assert ema.ema.state_dict()["running_mean"].tolist() == [1.0, 1.0]


def test_a_tied_weight_decays_once() -> None:
    """A tensor with two names keeps d, and not d², of its old value at an update, and stays tied."""
    model = Everything()
    nn.init.constant_(model.encode.weight, 1.0)
    ema = ModelEMA(model, decay=Constant(0.5))
    nn.init.constant_(model.encode.weight, 0.0)
    ema.update(model)
    average = ema.ema
    assert isinstance(average, Everything)
    assert average.encode.weight is average.decode.weight
    assert set(average.encode.weight.flatten().tolist()) == {0.5}


def test_complex_weights_are_averaged() -> None:
    """Complex parameters are averaged as real ones are."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2, dtype=torch.complex64))})
    ema = ModelEMA(model, decay=Constant(0.5))
    model.state_dict()["w"].fill_(2 + 4j)
    ema.update(model)
    assert ema.ema.state_dict()["w"].tolist() == [1 + 2j, 1 + 2j]


def test_frozen_weights_stay_in_the_average() -> None:
    """A model of which only a part trains is averaged as a whole, and the frozen part comes out as it is."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    frozen = state_of(model[0])
    ema = ModelEMA(model, decay=Constant(0.5))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 2)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
    average = ema.ema
    assert isinstance(average, nn.Sequential)
    assert_same(average[0], frozen)
    assert not torch.equal(average[1].state_dict()["weight"], model[1].state_dict()["weight"])


def test_a_parametrized_model_is_averaged() -> None:
    """Weight normalisation hides a tensor that is no leaf; the average is made and follows all the same."""
    model = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    model(torch.ones(1, 2))
    ema = ModelEMA(model, decay=Constant(0.0))
    drift_(model)
    ema.update(model)
    assert_same(ema.ema, state_of(model))
    torch.testing.assert_close(ema.ema(torch.ones(1, 2)), model(torch.ones(1, 2)).detach())


# -- ModelEMA: the module it keeps ---------------------------------------------------------------------------------


def test_the_average_is_in_eval_mode_without_gradients() -> None:
    """What is kept is for evaluating, and the model that trains is left as it was."""
    model = Everything()
    ema = ModelEMA(model)
    assert not any(module.training for module in ema.ema.modules())
    assert not any(parameter.requires_grad for parameter in ema.ema.parameters())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_average_shares_no_memory_with_the_model() -> None:
    """Changing the model's weights in place leaves the average as it is until the next update."""
    model = Everything()
    ema = ModelEMA(model)
    before = state_of(ema.ema)
    drift_(model)
    model(torch.randn(4, 6))
    assert_same(ema.ema, before)


def test_an_update_builds_no_gradient_history() -> None:
    """After updates between backward passes, the average still has no graph and the model still trains."""
    model = nn.Linear(2, 2)
    ema = ModelEMA(model)
    ema.update(model)
    model(torch.ones(1, 2)).sum().backward()
    ema.update(model)
    assert all(p.grad_fn is None and not p.requires_grad for p in ema.ema.parameters())
    assert model.weight.grad is not None


def test_evaluating_the_average_in_inference_mode_does_not_stop_the_updates() -> None:
    """An average that was evaluated in inference mode can still be updated."""
    model = Everything()
    ema = ModelEMA(model)
    with torch.inference_mode():
        ema.ema(torch.ones(2, 6))
    ema.update(model)
    assert ema.updates == 1


# -- ModelEMA: update_attr -----------------------------------------------------------------------------------------


class Named(nn.Module):
    """A module with plain attributes, such as detection scripts hang onto theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.names = ["cat"]
        self.stride = 8
        self.process_group = "old"
        self._hidden = "old"


def changed() -> tuple[Named, ModelEMA]:
    """A model all of whose attributes changed since its average was made."""
    model = Named()
    ema = ModelEMA(model)
    model.names, model.stride, model.process_group, model._hidden = ["dog"], 16, "new", "new"
    return model, ema


def test_without_include_all_public_attributes_are_copied() -> None:
    """`update_attr(model)` copies what is public and not excluded, and leaves the average in eval mode."""
    model, ema = changed()
    ema.update_attr(model)
    average = ema.ema
    assert isinstance(average, Named)
    assert (average.names, average.stride, average.process_group, average._hidden) == (["dog"], 16, "old", "old")
    assert not any(module.training for module in average.modules())
    assert average.layer is not model.layer


@pytest.mark.parametrize(
    ("include", "exclude", "copied"),
    [
        pytest.param(("stride",), (), {"stride"}, id="one included"),
        pytest.param(("stride", "names"), ("names",), {"stride"}, id="excluded although included"),
        pytest.param((), ("stride",), {"names", "process_group"}, id="one excluded"),
        pytest.param(("training",), (), set(), id="training mode included"),
        pytest.param(("_hidden",), (), set(), id="private included"),
    ],
)
def test_include_and_exclude_choose_attributes(
    include: tuple[str, ...], exclude: tuple[str, ...], copied: set[str]
) -> None:
    """Just what is included and not excluded is copied; private attributes and the training mode never are."""
    model, ema = changed()
    before = dict(vars(ema.ema))
    ema.update_attr(model, include=include, exclude=exclude)
    assert {name for name, value in vars(ema.ema).items() if value != before[name]} == copied


def test_attributes_come_from_inside_a_wrapper() -> None:
    """`update_attr` sees through a wrapper to the attributes of the module in it."""
    model, ema = changed()
    ema.update_attr(nn.DataParallel(model))
    assert ema.ema.stride == 16


# -- ModelEMA: going on --------------------------------------------------------------------------------------------


def _unpickled(ema: ModelEMA) -> ModelEMA:
    again = pickle.loads(pickle.dumps(ema))
    assert isinstance(again, ModelEMA)
    return again


def _loaded(ema: ModelEMA) -> ModelEMA:
    again = ModelEMA(Everything())
    again.load_state_dict(copy.deepcopy(ema.state_dict()))
    return again


@pytest.mark.parametrize(
    "again",
    [
        pytest.param(_unpickled, id="pickle"),
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(_loaded, id="state_dict"),
    ],
)
def test_an_average_goes_on_identically(again: Callable[[ModelEMA], ModelEMA]) -> None:
    """A copy, by whichever way, continues to the last bit, count and all, and does not disturb the original."""
    model = Everything()
    first = ModelEMA(model)
    for _ in range(3):
        drift_(model)
        first.update(model)
    frozen = state_of(first.ema)
    second = again(first)
    drift_(model)
    second.update(model)
    assert_same(first.ema, frozen)
    first.update(model)
    assert first.updates == second.updates == 4
    assert first.decay(4) == second.decay(4)
    assert_same(second.ema, state_of(first.ema))


def test_an_average_that_goes_on_does_not_start_its_ramp_over() -> None:
    """With the restored count, an update late in training hardly moves the average."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    resumed = ModelEMA(model)
    resumed.load_state_dict(ModelEMA(model, updates=100_000).state_dict())
    nn.init.constant_(model.weight, 0.0)
    resumed.update(model)
    assert resumed.updates == 100_001
    assert resumed.ema.state_dict()["weight"].item() == pytest.approx(0.9999)


# -- ModelEMA: wrappers --------------------------------------------------------------------------------------------


def _compiled(model: nn.Module) -> nn.Module:
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    return compiled


WRAPPERS = [
    pytest.param(nn.DataParallel, id="DataParallel"),
    pytest.param(nn.parallel.DistributedDataParallel, id="DistributedDataParallel"),
    pytest.param(_compiled, id="compile"),
    pytest.param(lambda model: _compiled(nn.parallel.DistributedDataParallel(model)), id="compile of DDP"),
    pytest.param(lambda model: nn.DataParallel(_compiled(model)), id="DataParallel of compile"),
]


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("wrapped", ["at construction", "at update", "throughout"])
def test_wrappers_are_seen_through(wrap: Callable[[nn.Module], nn.Module], wrapped: str) -> None:
    """The average is of the module inside a wrapper, whichever side was wrapped when."""
    model = Everything()
    wrapper = wrap(model)
    ema = ModelEMA(model if wrapped == "at update" else wrapper, decay=Constant(0.0))
    drift_(model)
    ema.update(model if wrapped == "at construction" else wrapper)
    assert type(ema.ema) is Everything
    assert_same(ema.ema, state_of(model))


@pytest.mark.parametrize("compiled", ["before the average", "after the average", "after the first update"])
def test_a_compiled_submodule_is_followed(compiled: str) -> None:
    """A submodule that is compiled at any time changes the state's names, and is averaged all the same."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    if compiled == "before the average":
        model[0] = _compiled(model[0])
    ema = ModelEMA(model, decay=Constant(0.0))
    if compiled == "after the average":
        model[0] = _compiled(model[0])
    ema.update(model)
    if compiled == "after the first update":
        model[0] = _compiled(model[0])
    drift_(model)
    ema.update(model)
    for average, weight in zip(ema.ema.parameters(), model.parameters(), strict=True):
        assert torch.equal(average, weight)


# -- ModelEMA: a model that does not match, or changes -------------------------------------------------------------


def test_a_missing_entry_is_named() -> None:
    """A model without a tensor that is averaged raises, and the error names the tensor."""
    ema = ModelEMA(nn.Linear(2, 2))
    with pytest.raises(EmaError, match="missing tensor: bias"):
        ema.update(nn.Linear(2, 2, bias=False))


def test_an_extra_entry_is_named() -> None:
    """A model with a tensor that is not averaged raises, and the error names the tensor."""
    ema = ModelEMA(nn.Linear(2, 2, bias=False))
    with pytest.raises(EmaError, match="unexpected tensor: bias"):
        ema.update(nn.Linear(2, 2))


def test_an_entry_of_another_shape_is_named() -> None:
    """A tensor of another shape raises rather than being broadcast, and the error has both shapes."""
    ema = ModelEMA(nn.Linear(2, 1))
    with pytest.raises(EmaError, match=r"weight \(expected \[1, 2\], got \[1, 3\]\)"):
        ema.update(nn.Linear(3, 1))


def test_a_refused_update_changes_nothing() -> None:
    """An update that raises neither counts nor touches the average."""
    ema = ModelEMA(nn.Linear(2, 2))
    before = state_of(ema.ema)
    with pytest.raises(EmaError):
        ema.update(nn.Linear(2, 3))
    assert ema.updates == 0
    assert_same(ema.ema, before)


def _assign(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def _replace(model: nn.Module) -> None:
    assert isinstance(model, nn.Sequential)
    model[0].weight = nn.Parameter(torch.zeros(3, 2))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_assign, id="load_state_dict with assign"),
        pytest.param(_replace, id="a parameter replaced"),
        pytest.param(lambda model: model.to(torch.bfloat16), id="to bf16"),
        pytest.param(lambda model: model.to(torch.float64), id="to fp64"),
    ],
)
@pytest.mark.parametrize("norm", [False, True], ids=["parameters", "parameters and buffers"])
def test_tensors_replaced_after_the_first_update_are_followed(change: Callable[[nn.Module], None], norm: bool) -> None:
    """The average follows the tensors that the model holds now, in the average's own dtype."""
    model = nn.Sequential(nn.Linear(2, 3), *([nn.BatchNorm1d(3)] if norm else []))
    ema = ModelEMA(model, decay=Constant(0.0))
    ema.update(model)
    change(model)
    drift_(model)
    ema.update(model)
    for name, tensor in model.state_dict().items():
        average = ema.ema.state_dict()[name]
        torch.testing.assert_close(average, tensor.to(average.dtype), rtol=1e-6, atol=1e-6)
        assert average.dtype in (torch.float32, torch.int64)


def test_an_average_converted_after_the_first_update_is_followed() -> None:
    """The average may be turned to another dtype at any time, too."""
    model = nn.Linear(2, 2)
    ema = ModelEMA(model, decay=Constant(0.0))
    ema.update(model)
    ema.ema.double()
    drift_(model)
    ema.update(model)
    assert_same(ema.ema, {name: tensor.double() for name, tensor in model.state_dict().items()})


def test_a_weight_whose_data_is_exchanged_is_followed() -> None:
    """A parameter that is given other memory under the same object, as FSDP and pruning do, is averaged from there."""
    model = nn.Linear(2, 2)
    ema = ModelEMA(model, decay=Constant(0.0))
    ema.update(model)
    model.weight.data = torch.randn(2, 2)
    ema.update(model)
    assert_same(ema.ema, state_of(model))


# -- ModelEMA: where YOLOv5's was ----------------------------------------------------------------------------------


def test_a_script_written_against_yolov5_runs_unchanged(tmp_path: Path) -> None:
    """Construct, train, evaluate, save half precision, resume: all that such a script does to its average works."""
    model = Named()
    ema = ModelEMA(model, 0.9999, 2000, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        model.layer(torch.randn(3, 2)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
    ema.update_attr(model, include=["names", "stride"])
    assert ema.decay(ema.updates) == pytest.approx(0.9999 * (1 - math.exp(-5 / 2000)))
    torch.save(
        {"ema": copy.deepcopy(ema.ema).half().state_dict(), "updates": ema.updates, "attr": ema.ema.names},
        tmp_path / "last.pt",
    )

    checkpoint = torch.load(tmp_path / "last.pt")
    resumed = ModelEMA(Named())
    resumed.ema.load_state_dict({name: tensor.float() for name, tensor in checkpoint["ema"].items()})
    resumed.updates = checkpoint["updates"]
    resumed.update(model)
    assert resumed.updates == 6
    assert isinstance(resumed.decay, ExponentialRamp)
