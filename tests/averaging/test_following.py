"""Following optimizers: what happens when another one takes over."""

import logging

import pytest
import torch
from torch import nn

from emaswap import Constant, ModelEMA


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
