"""What publishing costs the training step: throughput and the longest step, publishing every second against not at all."""

import itertools
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from benchmarks.bare import BareWriter
from benchmarks.models import Wide
from benchmarks.report import Row
from benchmarks.separate import SeparatePublisher
from emaswap import Architecture, Constant, ModelEMA, Publisher

_SPELLS = 5
_SPELL_S = 5.0
_EVERY_S = 1.0


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

    def spell(self, publisher: _Publisher | None) -> tuple[list[float], list[float]]:
        """Seconds of each step, and of each call of `publish`, over some seconds of training."""
        steps, calls = [], []
        end = due = time.perf_counter()
        end += _SPELL_S
        while (began := time.perf_counter()) < end:
            self.step()
            if publisher is not None and began >= due:
                called = time.perf_counter()
                publisher.publish(self.ema)
                calls.append(time.perf_counter() - called)
                due += _EVERY_S
            steps.append(time.perf_counter() - began)
        return steps, calls


def _training(device: torch.device, suffix: str) -> list[Row]:
    loop = _Loop(device)
    for _ in range(5):
        loop.step()
    copy_s = median(_copy(loop.ema.ema) for _ in range(9))
    probe = torch.randn(2, 2500)
    architecture = Architecture.of(Wide)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="emaswap-bench-") as folder:
        thread = Publisher(
            Path(folder) / "thread", model="wide", architecture=architecture, probe=probe, keep=2, grace_s=0
        )
        with thread as publisher:
            rows += _compared(loop, publisher, copy_s, f"thread, {suffix}", bars=True)
        with SeparatePublisher(Path(folder) / "process", Wide(), model="wide", probe=probe) as separate:
            rows += _compared(loop, separate, copy_s, f"process, {suffix}", bars=False)
        if device.type == "cpu":
            bare = BareWriter(Path(folder) / "bare")
            rows += _compared(loop, bare, copy_s, f"thread that only writes as many bytes, {suffix}", bars=False)[:1]
    return rows


def _compared(loop: _Loop, publisher: _Publisher, copy_s: float, suffix: str, *, bars: bool) -> list[Row]:
    """Spells of training in turn, with publishing every second and without."""
    publisher.publish(loop.ema)
    publisher.flush()
    without: list[float] = []
    publishing: list[float] = []
    calls: list[float] = []
    for spell in itertools.chain.from_iterable([(None, publisher)] * _SPELLS):
        steps, called = loop.spell(spell)
        (without if spell is None else publishing).extend(steps)
        calls += called
        publisher.flush()
    usual = median(without)
    stall, stall_without = (max(steps) - usual for steps in (publishing, without))
    throughput, stalls = (1 / 0.97, 1.5) if bars else (None, None)
    return [
        Row(
            f"mean step, publishing every second by {suffix}",
            mean(publishing) * 1e3,
            "ms",
            mean(without) * 1e3,
            throughput,
        ),
        Row(
            f"longest call of publish (floor: a copy of the weights), {suffix}",
            max(calls) * 1e3,
            "ms",
            copy_s * 1e3,
            stalls,
        ),
        Row(f"longest step beyond the median, publishing, {suffix}", stall * 1e3, "ms", copy_s * 1e3, stalls),
        Row(f"longest step beyond the median, not publishing, {suffix}", stall_without * 1e3, "ms", copy_s * 1e3),
    ]


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
