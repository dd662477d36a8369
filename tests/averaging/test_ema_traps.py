"""What went wrong in other libraries, and must not go wrong here; one test for each.

| reported | test |
| --- | --- |
| integer `num_batches_tracked` truncated or crashing | test_model_ema.py: integer buffers are copied, not blended |
| `_orig_mod.` and `module.` skip every parameter | test_model_ema.py: wrappers are seen through, a compiled submodule |
| deepcopy fails on weight_norm and parametrizations | a factory makes ..., a parametrized model is copied ... |
| a NaN in one step poisons the average for ever | values that are not finite |
| the counter is lost on resume | test_model_ema.py: an average that goes on does not start its ramp over |
| a step for each micro-batch, or where GradScaler left it out | what counts as an update |
| resuming from the average instead of the raw weights | the raw weights and the average go on each from its own |
| inference tensors that later updates cannot modify | inference mode |
| host syncs from counters on the GPU | no update waits for a device, counters are plain numbers |
| parameters replaced by `.to()` | test_model_ema.py: tensors replaced after the first update; a layer that is exchanged |
| swapping without try/finally | swapping |
| tied tensors decay twice, or are forgotten | test_model_ema.py: a tied weight decays once; ties |
"""

import copy
import pickle
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from emaswap import Constant, EmaError, InverseGamma, ModelEMA, PowerFunction, Schedule
from tests.models import Everything

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
NAN = float("nan")
BAD = [NAN, float("inf"), float("-inf")]
SCHEDULES: list[Schedule] = [Constant(0.9), PowerFunction(6.94)]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's state."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(module: nn.Module, expected: dict[str, Tensor]) -> None:
    """The module's state is just the one expected."""
    torch.testing.assert_close(dict(module.state_dict()), expected, rtol=0, atol=0)


def one(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A module of a single weight."""
    module = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(module.weight, value)
    return module


def weight_of(module: nn.Module) -> float:
    """The single weight of such a module."""
    return float(module.state_dict()["weight"].item())


# -- deepcopy ------------------------------------------------------------------------------------------------------


class Tracked(nn.Module):
    """A module that keeps a tensor with a history, as weight normalisation of the old kind does after a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.last = torch.zeros(2)

    def forward(self, rows: Tensor) -> Tensor:
        self.last = self.weight * rows
        return self.last


def test_a_module_that_cannot_be_copied_is_made_by_a_factory() -> None:
    """The error names the way out, and that way works."""
    model = Tracked()
    model(torch.ones(2))
    with pytest.raises(EmaError, match=r"Tracked cannot be deep-copied .* factory="):
        ModelEMA(model)
    with torch.no_grad():
        model.weight.fill_(5)
    ema = ModelEMA(model, decay=Constant(0.5), factory=Tracked)
    assert ema.ema.state_dict()["weight"].tolist() == [5, 5]
    with torch.no_grad():
        model.weight.fill_(7)
    ema.update(model)
    assert ema.ema.state_dict()["weight"].tolist() == [6, 6]


def _normalised() -> nn.Module:
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)), nn.BatchNorm1d(2))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_factory_makes_an_average_of_weight_normalisation_of_the_old_kind() -> None:
    """It computes a weight that is no leaf: nothing of it can be copied, and all of it is averaged, in each variant."""
    model = _normalised()
    model(torch.randn(4, 3)).sum().backward()
    with pytest.raises(EmaError, match=r"Sequential cannot be deep-copied .*: give ModelEMA\(..., factory=...\)"):
        ModelEMA(model)
    ema = ModelEMA(model, Constant(0.5), variants={"newest": Constant(0.0)}, factory=_normalised)
    assert_same(ema.ema, state_of(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    halfway = {
        name: (e + m) / 2 for (name, e), m in zip(state_of(ema.ema).items(), state_of(model).values(), strict=True)
    }
    halfway["1.num_batches_tracked"] = model.state_dict()["1.num_batches_tracked"]
    assert ema.update(model) is True
    torch.testing.assert_close(dict(ema.ema.state_dict()), halfway)
    rows = torch.randn(4, 3)
    assert torch.equal(ema.variants["newest"](rows), model.eval()(rows))
    assert not any(parameter.requires_grad for parameter in ema.ema.parameters())
    with ema.swapped_into(model):
        assert torch.equal(ema.ema(rows), model(rows))


def test_a_factory_need_not_compile_what_the_model_compiles() -> None:
    """What `torch.compile` puts into names is no reason not to find them."""
    model = nn.Sequential(nn.Linear(2, 2))
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
    ema = ModelEMA(model, Constant(0.0), factory=lambda: nn.Sequential(nn.Linear(2, 2)))
    for _ in range(2):
        assert [*map(Tensor.tolist, ema.ema.state_dict().values())] == [
            *map(Tensor.tolist, model.state_dict().values())
        ]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        ema.update(model)


def test_a_factory_of_another_model_is_an_error() -> None:
    """What it lacks and what has another shape is named, when the average is made."""
    with pytest.raises(
        EmaError, match=r"unexpected tensor: bias; wrong shape: weight \(expected \[2, 2\], got \[2, 3\]\)"
    ):
        ModelEMA(nn.Linear(3, 2), factory=lambda: nn.Linear(2, 2, bias=False))


def test_half_precision_from_a_factory_is_averaged_in_float32() -> None:
    """It starts at the model's weights, not at the factory's, and is as wide as a copy would be."""
    model = one(3.0, torch.bfloat16)
    ema = ModelEMA(model, factory=lambda: one(0.0, torch.bfloat16))
    weight = ema.ema.state_dict()["weight"]
    assert (weight.dtype, weight.item()) == (torch.float32, 3)


def test_a_parametrized_model_is_copied_and_averaged_after_a_forward_pass() -> None:
    """Spectral and weight normalisation are parametrizations today; both follow, vectors and all."""
    for normalise in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        model = normalise(nn.Linear(3, 2))
        model(torch.randn(4, 3)).sum().backward()
        ema = ModelEMA(model, decay=Constant(0.0))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        ema.update(model)
        assert_same(ema.ema, state_of(model))


# -- values that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_step_that_is_not_finite_never_enters_the_average(dtype: torch.dtype, bad: float) -> None:
    """It is left out whole and counted apart, and the next finite step goes in as if there had been none."""
    model = nn.Sequential(one(1.0, dtype), one(1.0, dtype))
    ema = ModelEMA(model, decay=Constant(0.5))
    before = state_of(ema.ema)
    good = state_of(model)
    with torch.no_grad():
        model[0].weight.fill_(3)  # type: ignore[operator]
        model[1].weight.fill_(bad)  # type: ignore[operator]
    for count in (1, 2):
        assert ema.update(model) is False
        assert (ema.updates, ema.skipped) == (0, count)
        assert_same(ema.ema, before)
    model.load_state_dict({name: tensor + 2 for name, tensor in good.items()})
    assert ema.update(model) is True
    assert (ema.updates, ema.skipped) == (1, 2)
    assert [float(tensor) for tensor in ema.ema.state_dict().values()] == [2, 2]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_one_bad_number_anywhere_leaves_the_average_as_if_that_step_had_not_been(data: st.DataObject) -> None:
    """Whatever the dtypes and shapes, in a parameter or in a buffer, for every variant and within any interval."""
    model = nn.Module()
    names = []
    for number in range(data.draw(st.integers(1, 4))):
        shape = data.draw(st.lists(st.integers(1, 4), max_size=3))
        tensor = torch.zeros(shape, dtype=data.draw(st.sampled_from(FLOATS)))
        names.append(f"t{number}")
        if data.draw(st.booleans()):
            model.register_buffer(names[-1], tensor)
        else:
            model.register_parameter(names[-1], nn.Parameter(tensor))
    every, bad_step = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    place = data.draw(st.sampled_from(names))
    bad = data.draw(st.sampled_from(BAD))
    schedule = data.draw(st.sampled_from(SCHEDULES))
    ema, other = (ModelEMA(model, schedule, variants={"short": Constant(0.5)}, update_every=every) for _ in range(2))
    for step in range(1, 7):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(step)
            if step == bad_step:
                model.state_dict()[place].view(-1)[-1] = bad
        # Between two intervals nobody looks, and nothing is taken in.
        if step == bad_step and step % every == 0:
            assert ema.update(model) is False
            assert (ema.updates, ema.skipped) == (step - 1, 1)
            continue
        assert ema.update(model) is other.update(model)
    assert ema.updates == other.updates
    assert_same(ema.ema, state_of(other.ema))
    assert_same(ema.variants["short"], state_of(other.variants["short"]))
    assert all(tensor.isfinite().all() for tensor in ema.ema.state_dict().values())


def test_infinities_that_cancel_are_found() -> None:
    """Both signs at once make no number either."""
    model = nn.Linear(2, 1, bias=False)
    ema = ModelEMA(model)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[float("inf"), float("-inf")]]))
    assert ema.update(model) is False
    assert ema.skipped == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_finite_values_are_averaged(dtype: torch.dtype) -> None:
    """Many of the largest numbers of a dtype, whose sum is not one of its own, are no reason to leave a step out."""
    model = nn.ParameterList([nn.Parameter(torch.full((70_000,), torch.finfo(dtype).max, dtype=dtype))])
    ema = ModelEMA(model, Constant(0.5))
    assert ema.update(model) is True
    assert ema.skipped == 0
    assert all(tensor.isfinite().all() for tensor in ema.ema.state_dict().values())


@pytest.mark.parametrize("schedule", [Constant(0.0), PowerFunction(6.94), InverseGamma()], ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["same dtype", "converted"])
@pytest.mark.parametrize("on_device", [False, True], ids=["on the host", "on the device"])
def test_weights_that_are_taken_as_they_are_replace_whatever_was_there(
    schedule: Schedule, dtype: torch.dtype | None, on_device: bool
) -> None:
    """An average that began with what memory happened to hold is healed by a first update that is a copy."""
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[NAN, float("inf"), -3e38]]))
    ema = ModelEMA(model, schedule, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, 3e38]]))
    if on_device:
        with torch.no_grad():
            ema._planned(model).run_unless(torch.zeros(1), [1 - schedule(1)])
    else:
        ema.update(model)
    assert torch.equal(ema.ema.state_dict()["weight"], model.weight.detach().to(dtype or torch.float32))


def test_an_infinity_that_is_meant_is_copied_along() -> None:
    """A mask of -inf in a buffer stands in nobody's way where buffers are copied, or it is left out by name."""
    model = one(1.0)
    model.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
    for ema in (ModelEMA(model, Constant(0.5), buffers="copy"), ModelEMA(model, Constant(0.5), exclude=["mask"])):
        nn.init.constant_(model.weight, 3.0)
        assert ema.update(model) is True
        assert_same(ema.ema, {"weight": ema.ema.state_dict()["weight"], "mask": state_of(model)["mask"]})
        nn.init.constant_(model.weight, 1.0)


def test_finite_values_whose_sum_overflows_are_averaged() -> None:
    """What is looked at is each number, and not whether they can be added up."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 3e38)
    ema = ModelEMA(model, decay=Constant(0.5))
    assert ema.update(model) is True
    assert (ema.updates, ema.skipped) == (1, 0)
    half = nn.Linear(300, 300, dtype=torch.float16)
    nn.init.constant_(half.weight, 60_000)
    assert ModelEMA(half).update(half) is True


def test_without_the_guard_nobody_looks() -> None:
    """`guard=False` is what other libraries do."""
    model = one(1.0)
    ema = ModelEMA(model, decay=Constant(0.5), guard=False)
    nn.init.constant_(model.weight, float("nan"))
    assert ema.update(model) is True
    assert weight_of(ema.ema) != weight_of(ema.ema)


@given(st.floats(0, 1), st.sampled_from([0.0, 1.0]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_the_flag_that_stays_on_the_device_decides_like_the_host(decay: float, flag: float, seed: int) -> None:
    """What CUDA does without waiting, done on the CPU: the very update when all is finite, and otherwise nothing."""
    torch.manual_seed(seed)
    model = Everything()
    model.register_parameter("wave", nn.Parameter(torch.randn(3, dtype=torch.complex64)))
    ema, other = (ModelEMA(model, decay=Constant(decay), guard=False) for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = state_of(other.ema)
    other.update(model)
    expected = before if flag else state_of(other.ema)
    with torch.no_grad():
        ema._planned(model).run_unless(torch.tensor([flag]), [1 - decay])
    torch.testing.assert_close(dict(ema.ema.state_dict()), expected, rtol=1e-6, atol=1e-7)


# -- what counts as an update --------------------------------------------------------------------------------------


def test_micro_batches_are_no_updates() -> None:
    """Under gradient accumulation, an average that follows the optimizer counts its steps and nothing else."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ModelEMA(model, decay=Constant(0.5))
    ema.follow(optimizer)
    made = []
    for micro in range(8):
        model(torch.ones(4, 2)).mean().backward()
        if micro % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
        made.append(ema.update(model))
    assert made == [False, False, False, True] * 2
    assert ema.updates == 2


def test_micro_batches_change_nothing_in_the_average() -> None:
    """Called for each micro-batch while it follows the optimizer, it is the average called once a step, to the last bit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    follows, told = ModelEMA(model), ModelEMA(model)
    follows.follow(optimizer)
    for micro in range(12):
        model(torch.randn(4, 2)).square().mean().backward()
        if micro % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
            told.update(model)
        follows.update(model)
    assert follows.updates == told.updates == 3
    assert_same(follows.ema, state_of(told.ema))


def test_a_step_of_any_followed_optimizer_is_an_update() -> None:
    """Where two optimizers share a model, each step counts, and both together count once."""
    model = nn.Sequential(one(1.0), one(1.0))
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model]
    ema = ModelEMA(model)
    for optimizer in optimizers:
        ema.follow(optimizer)
    model(torch.ones(1, 1)).sum().backward()
    made = []
    for stepping in ([0], [1], [0, 1], []):
        for index in stepping:
            optimizers[index].step()
        made.append(ema.update(model))
    assert made == [True, True, True, False]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_leaves_out_is_no_update(fused: bool) -> None:
    """An overflow that `GradScaler` finds does not count, whoever leaves the step out: the scaler, or a fused kernel."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    ema = ModelEMA(model, decay=Constant(0.5))
    ema.follow(optimizer)
    made = []
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale((model(torch.ones(4, 2)) * factor).mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        made.append(ema.update(model))
    assert made == [True, False, True]
    assert (ema.updates, ema.skipped) == (2, 0)


def test_counters_are_plain_numbers() -> None:
    """No update waits for a GPU to say how many there were."""
    model = Everything()
    ema = ModelEMA(model)
    ema.update(model)
    assert type(ema.updates) is int
    assert type(ema.decay(ema.updates)) is float


@pytest.mark.parametrize("decay", [0.9999, 0.4, 0.0])
def test_no_update_waits_for_a_device(decay: float) -> None:
    """On the "meta" device no number can be read at all, and updates go on, guard and all; only `skipped` must wait."""
    model = Everything()
    ema = ModelEMA(model, Constant(decay), variants={"short": Constant(0.5)}, update_every=2)
    for module in (ema.ema, *ema.variants.values(), model):
        module.to("meta")
    with torch.library._scoped_library("aten", "IMPL", "Meta") as library:
        library.impl("_fused_sgd_", lambda *_, **__: None)  # torch has none, and there is nothing to compute
        assert [ema.update(model) for _ in range(4)] == [False, True] * 2
    assert ema.updates == 4
    with pytest.raises(RuntimeError, match="item"):
        _ = ema.skipped


# -- ties ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("register", [nn.Module.register_buffer, nn.Module.register_parameter])
def test_weights_in_the_same_memory_decay_once(register: Callable[..., None]) -> None:
    """Tied not as one tensor but as two over the same numbers, they are still averaged once."""
    model, memory = nn.Module(), torch.ones(2)
    for name in ("one", "other"):
        register(model, name, nn.Parameter(memory) if register is nn.Module.register_parameter else memory.detach())
    ema = ModelEMA(model, Constant(0.5))
    memory.zero_()
    ema.update(model)
    assert [tensor.tolist() for tensor in ema.ema.state_dict().values()] == [[0.5, 0.5]] * 2


def test_weights_that_were_tied_when_the_average_was_made_must_stay_so() -> None:
    """One tensor cannot follow two; to go on with the first in silence would lose the second."""
    model = Everything()
    ema = ModelEMA(model)
    model.decode.weight = nn.Parameter(torch.zeros(6, 6))
    with pytest.raises(EmaError, match=r"tied only in the average: decode\.weight"):
        ema.update(model)


@pytest.mark.parametrize("pattern", ["encode.*", "decode.*"])
def test_a_tied_weight_is_left_out_under_each_of_its_names(pattern: str) -> None:
    """Whichever name is excluded, the tensor that it names is copied."""
    model = Everything()
    ema = ModelEMA(model, Constant(0.5), exclude=[pattern])
    nn.init.constant_(model.encode.weight, 7.0)
    ema.update(model)
    assert torch.equal(ema.ema.state_dict()["decode.weight"], model.decode.weight)


def test_a_pattern_that_names_nothing_is_an_error() -> None:
    """A misspelt name would be averaged in silence; the error says what names there are."""
    with pytest.raises(
        EmaError, match=r"exclude='decoed\.\*' names nothing that is averaged: there are .*encode\.weight"
    ):
        ModelEMA(Everything(), Constant(0.5), exclude=["encode.*", "decoed.*"])


# -- what is exchanged ---------------------------------------------------------------------------------------------


def test_a_layer_that_is_exchanged_is_followed() -> None:
    """A layer put in another's place between two updates is the one that is averaged from then on."""
    model = nn.Sequential(one(1.0), one(1.0))
    ema = ModelEMA(model, Constant(0.0))
    ema.update(model)
    model[0] = one(5.0)
    ema.update(model)
    assert [tensor.item() for tensor in ema.ema.state_dict().values()] == [5, 1]


# -- inference mode ------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Puts new tensors in the place of its buffers at each forward pass."""

    seen: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, rows: Tensor) -> Tensor:
        self.seen = self.seen + len(rows)
        self.mean = 0.5 * self.mean + 0.5 * rows.mean(dim=0)
        out: Tensor = self.layer(rows - self.mean)
        return out


@pytest.mark.parametrize("evaluated", ["the average", "a variant", "the model", "in its place"])
@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_evaluating_in_inference_mode_does_not_stop_the_updates(
    evaluated: str, buffers: Literal["average", "copy"]
) -> None:
    """Whoever leaves inference tensors in whose state, the next update takes the model's as ever, and training goes on."""
    model = Counting()
    ema = ModelEMA(model, Constant(0.5), variants={"short": Constant(0.0)}, buffers=buffers)
    model(torch.ones(2, 2))
    ema.update(model)
    modules = {"the average": ema.ema, "a variant": ema.variants["short"], "the model": model, "in its place": model}
    with torch.inference_mode():
        if evaluated == "in its place":
            with ema.swapped_into(model):
                model(torch.full((2, 2), 5.0))
        else:
            modules[evaluated](torch.full((2, 2), 5.0))
    model(torch.ones(2, 2)).sum().backward()
    assert ema.update(model) is True
    assert_same(ema.variants["short"], state_of(model))
    assert ema.ema.state_dict()["seen"].item() == (6 if evaluated == "the model" else 4)


def test_an_average_made_in_inference_mode_is_updated() -> None:
    """It consists of inference tensors from the start, and follows all the same."""
    model = Everything()
    with torch.inference_mode():
        ema = ModelEMA(model, Constant(0.0), variants={"short": Constant(0.0)})
    model(torch.randn(4, 6))
    ema.update(model)
    assert_same(ema.ema, state_of(model))
    assert_same(ema.variants["short"], state_of(model))


# -- resuming ------------------------------------------------------------------------------------------------------


def test_the_raw_weights_and_the_average_go_on_each_from_its_own() -> None:
    """Model and average are restored apart, and a run that was interrupted ends where one that was not does."""

    def train(model: nn.Module, ema: ModelEMA, steps: range) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in steps:
            optimizer.zero_grad()
            model(torch.full((2, 6), float(step + 1))).square().mean().backward()
            optimizer.step()
            ema.update(model)

    torch.manual_seed(0)
    start = nn.Linear(6, 1)
    whole = copy.deepcopy(start)
    ema = ModelEMA(whole)
    train(whole, ema, range(6))

    first = copy.deepcopy(start)
    first_ema = ModelEMA(first)
    train(first, first_ema, range(3))
    saved = copy.deepcopy((first.state_dict(), first_ema.state_dict()))
    resumed = nn.Linear(6, 1)
    resumed.load_state_dict(saved[0])
    resumed_ema = ModelEMA(resumed)
    resumed_ema.load_state_dict(saved[1])
    assert not torch.equal(resumed.weight, resumed_ema.ema.state_dict()["weight"])
    train(resumed, resumed_ema, range(3, 6))
    assert_same(resumed, state_of(whole))
    assert_same(resumed_ema.ema, state_of(ema.ema))
    assert resumed_ema.updates == 6


# -- swapping ------------------------------------------------------------------------------------------------------


def test_a_block_that_fails_gives_the_model_its_own_weights_back() -> None:
    """Inside, the model is the average; after an error, it is itself to the last bit, and can be updated again."""
    torch.manual_seed(0)
    model = Everything()
    ema = ModelEMA(model, decay=Constant(0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    ema.update(model)
    own = state_of(model)

    def evaluate() -> None:
        with ema.swapped_into(model):
            assert_same(model, state_of(ema.ema))
            with pytest.raises(EmaError, match="inside swapped_into"):
                ema.update(model)
            with pytest.raises(EmaError, match="inside swapped_into"), ema.swapped_into(model):
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate()
    assert_same(model, own)
    assert model.training
    assert ema.update(model) is True


@pytest.mark.parametrize("part", ["whole", "a part", "what holds it"])
def test_weights_that_another_average_swapped_in_are_not_averaged(part: str) -> None:
    """Whoever put them there, they are not the model's own; after the block, and not before it, updates go on."""
    model = nn.Sequential(nn.Sequential(one(0.0)))
    swapped, updated = {
        "whole": (model, model),
        "a part": (model, model[0]),
        "what holds it": (model[0], model),
    }[part]
    first, second, inner = ModelEMA(swapped), ModelEMA(updated, Constant(0.5)), ModelEMA(swapped)
    nn.init.constant_(model[0][0].weight, 8.0)  # type: ignore[index]
    with first.swapped_into(swapped):
        with inner.swapped_into(swapped):
            pass
        with pytest.raises(EmaError, match="inside swapped_into"):
            second.update(updated)
    assert second.update(updated) is True
    assert [tensor.item() for tensor in second.ema.state_dict().values()] == [4.0]


def _half(model: nn.Module) -> None:
    model.half()


def _assign(model: nn.Module) -> None:
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()}, assign=True)


def _layer(model: nn.Module) -> None:
    assert isinstance(model, Counting)
    model.layer.weight = nn.Parameter(torch.zeros(2, 2))


def _data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter)


def _forward(model: nn.Module) -> None:
    model(torch.full((3, 2), 9.0))


@pytest.mark.parametrize("inside", [_half, _assign, _layer, _data, _forward])
def test_tensors_exchanged_inside_a_block_are_changed_back(inside: Callable[[nn.Module], None]) -> None:
    """However the block leaves the model, after it the model has its own tensors: the objects, the dtypes, the bits."""
    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 2))
    ema = ModelEMA(model, Constant(0.5))
    nn.init.constant_(model.layer.weight, 3.0)
    ema.update(model)
    own, objects = state_of(model), [*model.parameters(), *model.buffers()]
    with ema.swapped_into(model):
        inside(model)
    assert_same(model, own)
    assert all(one is other for one, other in zip([*model.parameters(), *model.buffers()], objects, strict=True))
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.layer.weight, own["layer.weight"])
    assert ema.update(model) is True


def test_a_block_leaves_training_and_evaluation_as_they_are() -> None:
    """Neither the mode of a module nor what needs gradients changes, inside or after."""
    model = Everything()
    model.norm.eval()
    model.encode.requires_grad_(False)
    ema = ModelEMA(model)
    modes = [module.training for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    with ema.swapped_into(model):
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients


def test_odd_bits_survive_a_block() -> None:
    """Weights that are not finite, negative zeros and subnormal numbers come back as they were."""
    model = nn.ParameterList([nn.Parameter(torch.tensor([NAN, float("inf"), -0.0, 1e-45, -1e-45]))])
    ema = ModelEMA(model)
    before = model[0].detach().clone().view(torch.int32)
    with ema.swapped_into(model):
        nn.init.zeros_(model[0])
    assert torch.equal(model[0].detach().view(torch.int32), before)


def test_gradients_survive_a_block() -> None:
    """Between backward pass and step, evaluating the average does not touch the step."""
    stepped = []
    for evaluates in (False, True):
        torch.manual_seed(0)
        model = Everything()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ema = ModelEMA(model)
        model(torch.randn(4, 6)).sum().backward()
        if evaluates:
            with ema.swapped_into(model), torch.no_grad():
                model(torch.randn(4, 6))
        optimizer.step()
        stepped.append(state_of(model))
    torch.testing.assert_close(*stepped, rtol=0, atol=0)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))], ids=["copy", "pickle"])
def test_a_copy_made_inside_a_block_is_outside_of_it(again: Callable[[ModelEMA], ModelEMA]) -> None:
    """A snapshot taken while the model is being evaluated can be updated and swapped like any other."""
    model = Everything()
    ema = ModelEMA(model)
    with ema.swapped_into(model):
        copied = again(ema)
    assert copied.update(model) is True
    with copied.swapped_into(model):
        assert_same(model, state_of(copied.ema))
