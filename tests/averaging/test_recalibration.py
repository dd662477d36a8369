"""Recalibration takes what a `DataLoader` yields."""

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from emaswap import EmaError, recalibrate

ROWS, LABELS = torch.randn(8, 3) * 4 + 2, torch.arange(8)


class Two(nn.Module):
    """Two required inputs, an optional one, and a batch norm over their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, a: Tensor, b: Tensor, scale: Tensor | None = None) -> Tensor:
        """Normalize the sum."""
        out: Tensor = self.norm((a + b) * (1 if scale is None else scale))
        return out


class Several(Two):
    """The same, of any number of inputs."""

    def forward(self, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        """Normalize the first."""
        out: Tensor = self.norm(inputs[0])
        return out


class Named(Two):
    """The same, one of them by name only."""

    def forward(self, a: Tensor, *, b: Tensor) -> Tensor:  # type: ignore[override]
        """Normalize the sum."""
        out: Tensor = super().forward(a, b)
        return out


class Anything(Two):
    """The same, by any names."""

    def forward(self, **inputs: Tensor) -> Tensor:  # type: ignore[override]
        """Normalize the sum."""
        out: Tensor = super().forward(inputs["a"], inputs["b"])
        return out


def one() -> nn.Sequential:
    """A module with one input."""
    return nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))


def mean_of(module: nn.Module) -> Tensor:
    """The running mean of its batch norm."""
    found: Tensor = next(tensor for name, tensor in module.state_dict().items() if name.endswith("running_mean"))
    return found


@pytest.mark.parametrize(
    ("make", "batches", "expected"),
    [
        pytest.param(one, DataLoader(TensorDataset(ROWS), 4), ROWS, id="rows"),
        pytest.param(one, DataLoader(TensorDataset(ROWS, LABELS), 4), ROWS, id="rows and labels"),
        pytest.param(one, DataLoader(list(ROWS), 4), ROWS, id="tensors"),  # type: ignore[arg-type]
        pytest.param(one, [ROWS[:4], ROWS[4:]], ROWS, id="a list"),
        pytest.param(one, ((rows, 1) for rows in torch.split(ROWS, 4)), ROWS, id="an iterator of pairs"),
        pytest.param(one, [{"input": ROWS, "label": LABELS}], ROWS, id="by name"),
        pytest.param(Two, DataLoader(TensorDataset(ROWS, ROWS, LABELS), 4), 2 * ROWS, id="two and labels"),
        pytest.param(Two, [{"a": ROWS, "b": ROWS, "labels": 3}], 2 * ROWS, id="two by name"),
        pytest.param(Two, [UserDict(b=ROWS, a=ROWS, scale=torch.tensor(2.0))], 4 * ROWS, id="with the optional one"),
        pytest.param(Several, [ROWS], ROWS, id="any number, of which one is there"),
        pytest.param(Named, [{"a": ROWS, "b": ROWS}], 2 * ROWS, id="by name only"),
        pytest.param(Anything, [{"a": ROWS, "b": ROWS, "c": LABELS}], 2 * ROWS, id="any names"),
        pytest.param(lambda: torch.compile(one(), backend="eager"), [(ROWS, LABELS)], ROWS, id="compiled"),
    ],
)
def test_batches_of_any_kind_are_taken(make: Any, batches: Any, expected: Tensor) -> None:
    """`forward` gets the inputs that it needs, and no labels."""
    module = make()
    recalibrate(module, batches)
    torch.testing.assert_close(mean_of(module), expected.mean(0))


@pytest.mark.parametrize(
    ("make", "batches", "message"),
    [
        pytest.param(one, [], "no batch to recalibrate with", id="none"),
        pytest.param(
            one, [ROWS, [[1.0, 2.0, 3.0]]], "batch 2 holds a list at 0, expected a tensor", id="a list of numbers"
        ),
        pytest.param(one, [ROWS.numpy()], "batch 1 holds a ndarray at 0, expected a tensor", id="numpy"),
        pytest.param(one, [ROWS, ROWS * float("nan")], "statistics of these batches are not finite", id="NaN"),
        pytest.param(one, [()], "batch 1 has 0 tensors, and forward requires 1", id="an empty tuple"),
        pytest.param(one, [{"rows": ROWS}], "batch 1 has rows, and forward takes input", id="another name"),
        pytest.param(one, [{"input": "x"}], "batch 1 holds a str at 'input'", id="a text by name"),
        pytest.param(one, [{}], "batch 1 has nothing", id="an empty mapping"),
        pytest.param(Two, [{"a": ROWS}], "batch 1 does not give forward.* missing .*'b'", id="a name that is missing"),
        pytest.param(Named, [(ROWS, ROWS)], "batch 1 does not give forward.* missing .*'b'", id="only by name"),
        pytest.param(Several, [(ROWS, LABELS)], "batch 1 has 2 tensors, and forward takes any number", id="any number"),
        pytest.param(one, [ROWS, ROWS[:0]], "batch 2 is empty", id="no rows"),
        pytest.param(one, None, "the batches are an iterable of them, .* got NoneType", id="no iterable"),
        pytest.param(Two, [(ROWS,)], "batch 1 has 1 tensors, and forward requires 2", id="one of two"),
    ],
)
def test_what_is_no_batch_changes_nothing(make: Any, batches: Any, message: str) -> None:
    """The error says which batch and what came; statistics, momentum and mode are as before."""
    module = make().train()
    Two.forward(module, ROWS, ROWS) if isinstance(module, Two) else module(ROWS)
    if batches is None:
        module.eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(EmaError, match=message):
        recalibrate(module, batches)
    torch.testing.assert_close(dict(module.state_dict()), before)
    norm = next(each for each in module.modules() if isinstance(each, nn.BatchNorm1d))
    assert (norm.momentum, norm.training) == (0.1, False)


def test_a_forward_pass_that_fails_changes_nothing() -> None:
    """Also when some batches have been measured already."""
    module = one()
    module(ROWS)
    before = mean_of(module).clone()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        recalibrate(module, [ROWS, ROWS[:1]])
    assert torch.equal(mean_of(module), before)


class Stubborn(nn.Module):
    """Normalizes twice, and keeps the mode it is in, or its first batch norm in eval mode."""

    def __init__(self, *, freezes: bool) -> None:
        super().__init__()
        self.frozen, self.norm, self.drop = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.freezes = freezes

    def train(self, mode: bool = True) -> "Stubborn":
        """Stay in the mode."""
        return self

    def forward(self, rows: Tensor) -> Tensor:
        """Normalize."""
        if self.freezes:
            self.frozen.eval()
        out: Tensor = self.norm(self.drop(self.frozen(rows)))
        return out


def test_a_batch_norm_that_the_module_freezes_normalizes_by_its_own_statistics() -> None:
    """What follows it is measured behind those, and it still has them afterwards."""
    module = Stubborn(freezes=True)
    nn.init.constant_(module.frozen.running_mean, 7.0)  # type: ignore[arg-type]
    recalibrate(module, [ROWS])
    torch.testing.assert_close(module.norm.running_mean, (ROWS - 7).mean(0), rtol=1e-4, atol=1e-4)
    assert module.frozen.running_mean.tolist() == [7.0] * 3  # type: ignore[union-attr]


def test_a_module_that_does_not_hand_its_mode_on_is_evaluated() -> None:
    """Dropout is off while the statistics are measured, and batch norm is in eval mode afterwards."""
    module = Stubborn(freezes=False)
    state = torch.get_rng_state()
    recalibrate(module, [ROWS])
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(module.frozen.running_mean, ROWS.mean(0))
    assert not any(each.training for each in module.modules())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_measured_anew(bad: float) -> None:
    """The first batch takes their place."""
    module = one()
    nn.init.constant_(module[0].running_var, bad)  # type: ignore[arg-type]
    recalibrate(module, [ROWS])
    torch.testing.assert_close(module[0].running_var, ROWS.var(0))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.InstanceNorm1d(3, track_running_stats=True), "0 is an InstanceNorm1d, whose running statistics"),
        (nn.LazyBatchNorm1d, "0 has no statistics yet"),
        (lambda: nn.BatchNorm1d(3, device="meta"), "0 has no statistics yet"),
    ],
    ids=["instance norm", "lazy", "meta"],
)
def test_statistics_that_cannot_be_measured_are_refused(make: Any, message: str) -> None:
    """In words, rather than left as they were in silence."""
    with pytest.raises(EmaError, match=message):
        recalibrate(nn.Sequential(make()), [ROWS])
