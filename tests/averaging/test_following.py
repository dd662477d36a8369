"""Following optimizers: what happens when another one takes over."""

import copy
import logging
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from emaswap import Constant, EmaError, ModelEMA


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make one step."""
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_an_optimizer_that_is_replaced_unnoticed_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """The weights change and nothing is averaged: that is said once, with what to do, and doing it helps."""
    model = nn.Linear(2, 1)
    ema = ModelEMA(model, Constant(0.5))
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    ema.follow(first)
    train(model, first)
    assert ema.update(model) is True
    second = torch.optim.Adam(model.parameters())
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            train(model, second)
            assert ema.update(model) is False
    [record] = caplog.records
    assert "call follow() with that one" in record.getMessage()
    ema.follow(second)
    train(model, second)
    assert ema.update(model) is True
    assert ema.updates == 2


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
def test_micro_batches_are_no_reason_to_warn(caplog: pytest.LogCaptureFixture, *, norm: bool) -> None:
    """Gradients and statistics that change between two steps are not weights that change."""
    model = nn.Sequential(nn.Linear(2, 1), *([nn.BatchNorm1d(1)] if norm else []))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ModelEMA(model)
    ema.follow(optimizer)
    with caplog.at_level(logging.WARNING):
        for micro in range(12):
            model(torch.randn(4, 2)).sum().backward()
            if micro % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
            ema.update(model)
    assert ema.updates == 3
    assert caplog.records == []


def test_an_evaluation_in_place_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    """The weights are the model's own again after it, though every one was written."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ModelEMA(model)
    ema.follow(optimizer)
    with caplog.at_level(logging.WARNING):
        train(model, optimizer)
        assert ema.update(model) is True
        with ema.swapped_into(model):
            model(torch.ones(1, 2))
        assert ema.update(model) is False
    assert caplog.records == []


def test_a_fused_step_that_a_scaler_leaves_out_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    """Its kernel touches the weights, and leaves them as they are."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ema = ModelEMA(model)
    ema.follow(optimizer)
    with caplog.at_level(logging.WARNING):
        for factor in (1.0, float("inf"), float("inf"), 1.0):
            scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            ema.update(model)
    assert ema.updates == 2
    assert caplog.records == []


@pytest.mark.parametrize("again", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))], ids=["copy", "pickle"])
def test_a_copy_that_follows_nothing_says_so(
    caplog: pytest.LogCaptureFixture, again: Callable[[ModelEMA], ModelEMA]
) -> None:
    """An optimizer does not come along with a copy: its first update is a warning, unless it follows one itself."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ModelEMA(model)
    ema.follow(optimizer)
    forgetful, following, plain = again(again(ema)), again(ema), again(ModelEMA(model))
    following.follow(optimizer)
    with caplog.at_level(logging.WARNING):
        assert [each.update(model) for each in (following, plain)] == [False, True]
        assert caplog.records == []
        assert [forgetful.update(model) for _ in range(2)] == [True, True]
    [record] = caplog.records
    assert "follows no optimizer, so each update counts: call follow()" in record.getMessage()


def test_a_step_whose_update_failed_still_counts() -> None:
    """When the model is as it should be again, the average takes in what the optimizer did, once."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ModelEMA(model)
    ema.follow(optimizer)
    train(model, optimizer)
    model.register_buffer("more", torch.ones(1))
    with pytest.raises(EmaError, match="unexpected tensor: more"):
        ema.update(model)
    del model.more
    assert [ema.update(model) for _ in range(2)] == [True, False]
    assert ema.updates == 1
