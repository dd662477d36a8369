"""How long an EMA update takes, against the memory traffic that it cannot avoid."""

import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from benchmarks.report import Row
from emaswap import ModelEMA

_ROUNDS = 15


class _Shapes(nn.Module):
    """A module with about the tensors of a ResNet-50: 161 of them, 25 million numbers."""

    def __init__(self) -> None:
        super().__init__()
        widths = [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Conv2d(4 * width, width, 1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.Conv2d(width, width, 3, bias=False),
                    nn.BatchNorm2d(width),
                    nn.Conv2d(width, 4 * width, 1, bias=False),
                    nn.BatchNorm2d(4 * width),
                ]
            )
            for width in widths
        )
        self.head = nn.Linear(2048, 1000)


def measure() -> list[Row]:
    """One update of a ResNet-50-like module, with one thread and with two."""
    rows = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model = _Shapes()
        ema = ModelEMA(model, decay=0.999)
        count = sum(tensor.numel() for tensor in ema.ema.state_dict().values() if tensor.is_floating_point())
        average, weights = torch.zeros(count), torch.ones(count)
        loop = copy.deepcopy(model)
        floor, update, by_hand = _interleaved(
            lambda average=average, weights=weights: average.lerp_(weights, 0.001),  # type: ignore[misc]
            lambda ema=ema, model=model: ema.update(model),  # type: ignore[misc]
            lambda loop=loop, model=model: _by_hand(loop, model),  # type: ignore[misc]
        )
        suffix = f"{count / 1e6:.0f} M numbers, {threads} thread{'s' if threads > 1 else ''}"
        rows.append(Row(f"ModelEMA.update, {suffix}", update * 1000, "ms", floor * 1000, 1.1))
        rows.append(Row(f"mul_ and add_ over state_dict, {suffix}", by_hand * 1000, "ms", floor * 1000))
    torch.set_num_threads(before)
    return rows


def _by_hand(average: nn.Module, model: nn.Module, decay: float = 0.999) -> None:
    """What people write: for each entry of the state, average·d + (1 − d)·weights."""
    with torch.no_grad():
        weights = model.state_dict()
        for name, value in average.state_dict().items():
            if value.is_floating_point():
                value.mul_(decay).add_((1 - decay) * weights[name])


def _interleaved(*works: Callable[[], object]) -> list[float]:
    """The median seconds of each; in turn, so that a slow spell of the machine meets all of them."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(_ROUNDS):
        for work, times in zip(works, seconds, strict=True):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return [median(times) for times in seconds]
