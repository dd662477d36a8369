"""Loading a saved average: all of it or nothing, whatever is wrong with a field."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from emaswap import Constant, EmaError, ExponentialRamp, ModelEMA

FIELDS = ["updates", "behind", "skipped", "update_every", "schedule", "ema", "variants"]


def average(weight: float, updates: int) -> ModelEMA:
    """An average in the middle of an interval, with a variant."""
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    nn.init.constant_(model[0].weight, weight)  # type: ignore[arg-type]
    ema = ModelEMA(model, ExponentialRamp(0.9, weight), update_every=3, variants={"slow": Constant(0.5)})
    for _ in range(updates):
        ema.update(model)
    return ema


def flat(state: Any) -> Any:
    """A state as plain values that compare."""
    if isinstance(state, torch.Tensor):
        return state.dtype, state.tolist()
    return {name: flat(value) for name, value in state.items()} if isinstance(state, dict) else state


def check_refused(state: Any, match: str = "state") -> None:
    """Loading raises, and nothing has changed."""
    ema = average(2.0, 4)
    before = flat(copy.deepcopy(ema.state_dict()))
    with pytest.raises(EmaError, match=match):
        ema.load_state_dict(state)
    assert flat(ema.state_dict()) == before


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_missing_changes_nothing(name: str) -> None:
    """It is named, with those that there are."""
    state = average(3.0, 8).state_dict()
    assert sorted(state) == sorted(FIELDS)
    del state[name]
    check_refused(state, f"has .*{name}.*; this one: ")


BAD: list[Any] = [
    None,
    "5",
    -1,
    2.5,
    True,
    math.nan,
    [],
    {},
    {"slow": None},
    torch.ones(2),
    {5: 1},
    {"name": "constant", 5: 1},
]


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(
    "bad", [*BAD, {"name": "constant", "decay": torch.ones(2)}, 10**400], ids=lambda bad: repr(bad)[:40]
)
def test_a_field_of_another_kind_changes_nothing(name: str, bad: object) -> None:
    """Whatever stands in a field that does not belong there."""
    check_refused(average(3.0, 8).state_dict() | {name: bad})


@pytest.mark.parametrize("state", [None, 5, [], {}, {"ema": {}}, "state"], ids=repr)
def test_what_is_no_state_changes_nothing(state: object) -> None:
    """Something else altogether."""
    check_refused(state)


def test_an_unknown_field_changes_nothing() -> None:
    """A state of something else, or of another release, is not half understood."""
    check_refused(average(3.0, 8).state_dict() | {"decay": 0.9}, "decay")


@pytest.mark.parametrize("variant", [False, True], ids=["main", "variant"])
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda tensors: tensors.pop("0.bias"), id="missing"),
        pytest.param(lambda tensors: tensors.update(more=torch.ones(1)), id="more"),
        pytest.param(lambda tensors: tensors.update({5: torch.ones(1)}), id="a number for a name"),
        pytest.param(lambda tensors: tensors.update({"0.bias": torch.ones(2)}), id="shape"),
        pytest.param(lambda tensors: tensors.update({"0.bias": torch.ones(1).double()}), id="dtype"),
        pytest.param(lambda tensors: tensors.update({"0.bias": 1.0}), id="number"),
        pytest.param(lambda tensors: tensors.update({"1.num_batches_tracked": torch.tensor(1.0)}), id="integer"),
    ],
)
def test_tensors_of_another_average_change_nothing(spoil: Any, *, variant: bool) -> None:
    """Names, shapes and dtypes of every average are compared before one is loaded."""
    state = copy.deepcopy(average(3.0, 8).state_dict())
    spoil(state["variants"]["slow"]["ema"] if variant else state["ema"])
    check_refused(state, "bias|more|num_batches_tracked")


def test_counts_that_do_not_fit_together_change_nothing() -> None:
    """An average cannot be further behind than its interval, or than it has had updates."""
    for fields in ({"behind": 3}, {"behind": 2, "updates": 1}):
        check_refused(average(3.0, 8).state_dict() | fields, "do not fit together")


def test_a_whole_state_is_loaded() -> None:
    """What all of these spoil is good as it is."""
    ema, other = average(2.0, 4), average(3.0, 8)
    ema.load_state_dict(copy.deepcopy(other.state_dict()))
    assert flat(ema.state_dict()) == flat(other.state_dict())
