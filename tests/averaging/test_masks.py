"""State that is not finite from the start, as a causal mask of −∞: averaged around, and told apart from a diverged step."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from emaswap import Constant, ModelEMA, Schedule, Snapshot, synthesize

NAN, INF = float("nan"), float("inf")


class Masked(nn.Module):
    """A weight beside a mask, which is a buffer or a parameter."""

    mask: Tensor

    def __init__(self, mask: Tensor, kind: str = "buffer") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=mask.dtype))
        if kind == "buffer":
            self.register_buffer("mask", mask.clone())
        else:
            self.mask = nn.Parameter(mask.clone())


CAUSAL = torch.full((4, 4), -INF).triu(1)
MASKS = {
    "causal": CAUSAL,
    "nan": torch.tensor([NAN, 1.0]),
    "both signs": torch.tensor([INF, -INF, NAN, 0.0]),
    "half": CAUSAL.bfloat16(),
    "double": CAUSAL.double(),
    "complex": torch.tensor([complex(-INF, 0), 1j]),
}


def step(model: Masked, by: float = 2.0) -> None:
    """Move the weight, as an optimizer would."""
    with torch.no_grad():
        model.weight.add_(by)


@pytest.mark.parametrize("kind", ["buffer", "parameter"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("guard", [True, False], ids=["guard", "no guard"])
def test_a_mask_that_was_there_from_the_start_stops_no_update(mask: Tensor, kind: str, *, guard: bool) -> None:
    """The weight is averaged, by every variant, and the mask stays as it is to the last bit."""
    model = Masked(mask, kind)
    ema = ModelEMA(model, Constant(0.5), variants={"slow": Constant(0.75)}, guard=guard)
    for _ in range(3):
        step(model)
        assert ema.update(model) is True
    assert (ema.updates, ema.skipped) == (3, 0)
    for average, expected in ((ema.ema, 5.25), (ema.variants["slow"], 3.53125)):
        state = average.state_dict()
        assert state["weight"].tolist() == [expected] * 2
        torch.testing.assert_close(state["mask"], mask.to(state["mask"].dtype), equal_nan=True, rtol=0, atol=0)


def test_numbers_beside_a_mask_in_one_tensor_are_averaged() -> None:
    """A parameter of which some entries are −∞ for good is averaged in all others."""
    model = Masked(torch.tensor([-INF, 0.0]), "parameter")
    ema = ModelEMA(model, Constant(0.5))
    with torch.no_grad():
        model.mask[1] = 4.0
    ema.update(model)
    assert ema.ema.state_dict()["mask"].tolist() == [-INF, 2.0]


@pytest.mark.parametrize(
    ("change", "left"),
    [
        pytest.param(lambda mask: mask.neg_(), True, id="another sign"),
        pytest.param(lambda mask: mask.fill_(NAN), True, id="NaN instead"),
        pytest.param(lambda mask: mask.copy_(CAUSAL.T), True, id="another place"),
        pytest.param(lambda mask: mask.zero_(), False, id="finite now"),
    ],
)
def test_a_mask_that_changes_is_looked_at(change: Callable[[Tensor], Tensor], *, left: bool) -> None:
    """Infinities that are new are a reason to leave an update out; a value that became finite is taken over."""
    model = Masked(CAUSAL)
    ema = ModelEMA(model, Constant(0.5))
    step(model)
    change(model.mask)
    assert ema.update(model) is not left
    assert ema.skipped == int(left)
    torch.testing.assert_close(ema.ema.state_dict()["mask"], CAUSAL if left else torch.zeros(4, 4))


def test_a_diverged_weight_beside_a_mask_is_left_out() -> None:
    """The mask does not hide a NaN elsewhere, also after a state was loaded."""
    model = Masked(CAUSAL)
    ema, other = (ModelEMA(model, Constant(0.5)) for _ in range(2))
    other.load_state_dict(ema.state_dict())
    for each in (ema, other):
        nn.init.constant_(model.weight, 3.0)
        assert each.update(model) is True
        nn.init.constant_(model.weight, NAN)
        assert each.update(model) is False
        assert each.ema.state_dict()["weight"].tolist() == [2.0, 2.0]


def test_a_mask_that_comes_with_a_loaded_state_is_known() -> None:
    """An average that had no mask when it began has the loaded one."""
    plain, masked = Masked(torch.zeros(4, 4)), Masked(CAUSAL)
    ema = ModelEMA(plain, Constant(0.5))
    ema.update(plain)
    ema.load_state_dict(ModelEMA(masked, Constant(0.5)).state_dict())
    step(masked)
    assert ema.update(masked) is True
    assert ema.ema.state_dict()["weight"].tolist() == [2.0, 2.0]


def test_a_mask_that_is_put_into_the_average_is_known() -> None:
    """Also where somebody loads into the averaged module itself, between two updates."""
    plain, masked = Masked(torch.zeros(4, 4)), Masked(CAUSAL)
    ema = ModelEMA(plain, Constant(0.5))
    ema.update(plain)
    ema.ema.load_state_dict(masked.state_dict())
    plain.load_state_dict(masked.state_dict())
    step(plain)
    assert ema.update(plain) is True
    assert ema.ema.state_dict()["weight"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("schedule", [Constant(0.0), Constant(0.3), Constant(0.9)], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("diverged", [False, True], ids=["finite", "diverged"])
def test_what_stays_on_the_device_decides_alike(schedule: Schedule, mask: Tensor, *, diverged: bool) -> None:
    """What CUDA does without waiting, done on the CPU, gives the same as what the host does."""
    model = Masked(mask)
    ema, other = (ModelEMA(model, schedule) for _ in range(2))
    step(model, NAN if diverged else 2.0)
    other.update(model)
    with torch.no_grad():
        plan = ema._planned(model)
        plan.run_unless(plan.found_inf(), [1 - schedule(1)])
    torch.testing.assert_close(dict(ema.ema.state_dict()), dict(other.ema.state_dict()), equal_nan=True)


def test_the_first_update_that_is_left_out_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """It names the tensors, and is not repeated; `skipped` goes on counting."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    ema = ModelEMA(model)
    nn.init.constant_(model[1].weight, NAN)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            ema.update(model)
    assert ema.skipped == 5
    [record] = caplog.records
    assert "NaNs or infinities in 1.weight;" in record.getMessage()
    assert record.name.startswith("emaswap.")


def test_an_average_that_is_made_afterwards_has_the_mask() -> None:
    """Coefficients of both signs make no NaN of its infinities."""
    model = Masked(CAUSAL)
    ema = ModelEMA(model, Constant(0.5), variants={"slow": Constant(0.8)})
    snapshots = []
    for _ in range(6):
        step(model)
        ema.update(model)
        snapshots += [Snapshot.of(ema), Snapshot.of(ema, "slow")]
    found = synthesize(snapshots, Constant(0.7), max_error=1)
    assert torch.equal(found["mask"], CAUSAL)
    assert found["weight"].isfinite().all()
