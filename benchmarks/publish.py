"""What publishing costs the training step, against a thread that only writes as many bytes, and against none."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from benchmarks.bare import BareWriter
from benchmarks.models import Wide
from benchmarks.report import Row
from emaswap import Architecture, Constant, ModelEMA, Publisher

_SPELLS = 5
_SPELL_S = 5.0
_EVERY_S = 1.0
# What no publisher can avoid is the writing; what it adds to that is bounded.
_BAR = 1.02
_STALL_BAR = 1.5


def measure() -> list[Row]:
    """Training of 25 M weights (100 MB) in fp32, on the CPU with one thread and with two, and on a GPU where there is one."""
    rows: list[Row] = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rows += _training(torch.device("cpu"), f"{threads} thread{'s' if threads > 1 else ''}")
    torch.set_num_threads(before)
    if torch.cuda.is_available():
        rows += _training(torch.device("cuda"), "GPU")
    return rows


class _Publisher(Protocol):
    def publish(self, ema: ModelEMA, /) -> None: ...

    def flush(self) -> None: ...


class _Loop:
    """A training loop whose steps are timed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.model = Wide().to(device)
        self.ema = ModelEMA(self.model, Constant(0.999))
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self._inputs = torch.randn(64, 2500, device=device)

    def step(self) -> None:
        loss = functional.mse_loss(self.model(self._inputs), self._inputs)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.ema.update(self.model)
        loss.item()  # as loops do that show their loss; on a GPU, the step is over only then

    def train(self, spell: "_Spell", publisher: _Publisher | None) -> None:
        """Train for some seconds, publishing every second if there is a publisher, and time it."""
        end = due = time.perf_counter()
        end += _SPELL_S
        while (began := time.perf_counter()) < end:
            self.step()
            if publisher is not None and began >= due:
                called = time.perf_counter()
                publisher.publish(self.ema)
                spell.calls.append(time.perf_counter() - called)
                due += _EVERY_S
            spell.steps.append(time.perf_counter() - began)


def _training(device: torch.device, suffix: str) -> list[Row]:
    loop = _Loop(device)
    for _ in range(5):
        loop.step()
    copy_s = median(_copy(loop.ema.ema) for _ in range(9))
    with tempfile.TemporaryDirectory(prefix="emaswap-bench-") as folder:
        bare = BareWriter(Path(folder) / "bare")
        with Publisher(
            Path(folder) / "store",
            name="wide",
            architecture=Architecture.of(Wide),
            probe=torch.randn(2, 2500),
            keep=2,
            grace_s=0,
        ) as publisher:
            alone, writing, publishing = _in_turn(loop, [None, bare, publisher])
    usual = median(alone.steps)
    return [
        Row(
            f"mean step, publishing every second (floor: a thread that only writes as many bytes), {suffix}",
            mean(publishing.steps) * 1e3,
            "ms",
            mean(writing.steps) * 1e3,
            _BAR,
        ),
        Row(
            f"mean step, a thread only writing as many bytes every second (floor: not publishing), {suffix}",
            mean(writing.steps) * 1e3,
            "ms",
            mean(alone.steps) * 1e3,
        ),
        Row(
            f"longest call of publish (floor: a copy of the weights), {suffix}",
            max(publishing.calls) * 1e3,
            "ms",
            copy_s * 1e3,
            _STALL_BAR,
        ),
        Row(
            f"longest step beyond the median, publishing (floor: writing alone), {suffix}",
            (max(publishing.steps) - usual) * 1e3,
            "ms",
            (max(writing.steps) - usual) * 1e3,
            _STALL_BAR,
        ),
    ]


@dataclass
class _Spell:
    """Seconds of each step, and of each call of `publish`."""

    steps: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)


def _in_turn(loop: _Loop, publishers: Sequence[_Publisher | None]) -> list[_Spell]:
    """Train for some seconds with each publisher in turn, several times over."""
    spells = [_Spell() for _ in publishers]
    for each in filter(None, publishers):
        each.publish(loop.ema)
        each.flush()
    for _ in range(_SPELLS):
        for spell, publisher in zip(spells, publishers, strict=True):
            loop.train(spell, publisher)
            if publisher is not None:
                publisher.flush()
    return spells


def _copy(module: nn.Module) -> float:
    """The seconds of one copy of the weights into memory that is there."""
    sources = [parameter.detach() for parameter in module.parameters()]
    targets = [torch.zeros_like(source) for source in sources]
    _wait(sources[0].device)
    began = time.perf_counter()
    torch._foreach_copy_(targets, sources)
    _wait(sources[0].device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
