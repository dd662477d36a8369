"""What an average, a publish and a swap cost on a CUDA device."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.models import Wide, vit_b_like
from benchmarks.open_loop import Answers, OpenLoop
from benchmarks.report import Row
from benchmarks.servers import SERVICE_PORT, service, url
from benchmarks.swap import publishing
from benchmarks.wrk import available, load
from emaswap import Architecture, Constant, ModelEMA, Publisher

_ROUNDS = 50
_SECONDS = 10.0


def measure() -> list[Row]:
    """A ViT-B to average, 100 MB to publish and to swap."""
    if not torch.cuda.is_available():
        raise SystemExit("the benchmark of CUDA needs a CUDA device")
    print(torch.cuda.get_device_name())
    return [*_measure_update(), *_measure_publish(), *(_measure_swap() if available() else [])]


def _measure_update() -> list[Row]:
    """The floor copies as many bytes as an update reads and writes: three for each of the model's."""
    model = vit_b_like().cuda()
    ema = ModelEMA(model, decay=Constant(0.999))
    size = sum(weight.nbytes for weight in model.parameters())
    source = torch.empty(3 * size // 8, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    floor = _timed(lambda: target.copy_(source))
    took = _timed(lambda: ema.update(model))
    ema.guard = False
    unguarded = _timed(lambda: ema.update(model))
    return [
        Row("ModelEMA.update, ViT-B, CUDA", unguarded * 1e3, "ms", floor * 1e3),
        Row("… with the guard, CUDA", took * 1e3, "ms", floor * 1e3),
    ]


def _measure_publish() -> list[Row]:
    """A step of training alone, and while versions are published as fast as they can be."""
    model = Wide().cuda()
    rows = torch.rand(256, 2500, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(rows).square().mean().backward()
        optimizer.step()

    alone = _timed(step)
    with tempfile.TemporaryDirectory(prefix="emaswap-bench-") as folder:
        store = Path(folder) / "store"
        with Publisher(
            store, name="wide", architecture=Architecture.of(Wide), probe=torch.rand(2, 2500), keep=2, grace_s=0
        ) as publisher:
            calls = []

            def both() -> None:
                step()
                began = time.perf_counter()
                publisher.publish(model)
                calls.append(time.perf_counter() - began)

            beside = _timed(both)
    return [
        Row("training step while publishing, 100 MB, CUDA", beside * 1e3, "ms", alone * 1e3),
        Row("median call of publish(), 100 MB, CUDA", median(calls) * 1e3, "ms"),
    ]


def _measure_swap() -> list[Row]:
    """Answers on the device while 100 MB are swapped every second, and while none are."""
    request = {"inputs": [[round(value, 4) for value in torch.rand(2500).tolist()]]}
    module = Wide().cuda()
    with tempfile.TemporaryDirectory(prefix="emaswap-bench-") as folder:
        store = Path(folder) / "store"
        with Publisher(
            store, name="wide", architecture=Architecture.of(Wide), probe=torch.rand(2, 2500), keep=2, grace_s=0
        ) as publisher:
            publisher.publish(module)
            publisher.flush()
            with service(store, "--device", "cuda"):
                per_s = load(url(SERVICE_PORT), request, connections=16, seconds=3).per_s / 2
                without = _answers(request, per_s)
                with publishing(publisher, module):
                    swapping = _answers(request, per_s)
    return [
        Row(
            "p99 with a swap a second, CUDA", swapping.percentile_s(99) * 1e3, "ms", without.percentile_s(99) * 1e3, 1.1
        )
    ]


def _answers(request: object, per_s: float) -> Answers:
    return OpenLoop(url(SERVICE_PORT), request, per_s=per_s, seconds=_SECONDS).answers()


def _timed(work: Callable[[], object]) -> float:
    """Return the median time of some work, its part on the device included."""
    times = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[5:])
