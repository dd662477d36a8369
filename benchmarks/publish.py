"""What publishing costs the training step: throughput and the longest step, publishing every second against not at all."""

import itertools
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional

from benchmarks.models import Wide
from benchmarks.report import Row
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

    def spell(self, publisher: Publisher | None) -> tuple[list[float], list[float]]:
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
    copies = [_copy(loop.ema.ema) for _ in range(9)]
    without: list[float] = []
    publishing: list[float] = []
    calls: list[float] = []
    with tempfile.TemporaryDirectory(prefix="emaswap-bench-") as folder:
        store = Path(folder) / "store"
        with Publisher(
            store, model="wide", architecture=Architecture.of(Wide), probe=torch.randn(2, 2500), keep=2, grace_s=0
        ) as publisher:
            publisher.publish(loop.ema)
            publisher.flush()
            for spell in itertools.chain.from_iterable([(None, publisher)] * _SPELLS):
                steps, called = loop.spell(spell)
                (without if spell is None else publishing).extend(steps)
                calls += called
                publisher.flush()
    copy_ms, step_ms = median(copies) * 1000, median(without) * 1000
    mean_without, mean_publishing = (sum(steps) / len(steps) * 1000 for steps in (without, publishing))
    return [
        Row(f"mean step while publishing every second, {suffix}", mean_publishing, "ms", mean_without, 1 / 0.97),
        Row(
            f"longest call of publish (floor: one copy of the weights), {suffix}", max(calls) * 1000, "ms", copy_ms, 1.5
        ),
        Row(
            f"longest step beyond the median, publishing, {suffix}",
            max(publishing) * 1000 - step_ms,
            "ms",
            copy_ms,
            1.5,
        ),
        Row(f"longest step beyond the median, not publishing, {suffix}", max(without) * 1000 - step_ms, "ms", copy_ms),
        Row(f"median step, {suffix}", step_ms, "ms"),
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
