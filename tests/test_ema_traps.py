"""What went wrong in other libraries, and must not go wrong here; one test for each.

| reported | test |
| --- | --- |
| integer `num_batches_tracked` truncated or crashing | test_ema.py: integer buffers are copied, not blended |
| `_orig_mod.` and `module.` skip every parameter | test_ema.py: wrappers are seen through |
| parameters replaced by `.to()` | test_ema.py: tensors replaced after the first update are followed |
| inference tensors that later updates cannot modify | test_ema.py: evaluating the average in inference mode |
| the others | below |
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from emaswap import Constant, EmaError, ModelEMA
from tests.models import Everything


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
