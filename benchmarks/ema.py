"""How long an EMA update takes, against the memory traffic that it cannot avoid, and against the averages of others."""

import gc
from collections.abc import Callable

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.models import resnet50_like, vit_b_like
from benchmarks.peers import peers
from benchmarks.report import Row, over
from benchmarks.timing import interleaved
from emaswap import Constant, ModelEMA

_VARIANTS = 4
_RUNS = 3
_MODELS: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    "ResNet-50": (resnet50_like, 15, 1.3),
    "ViT-B": (vit_b_like, 9, 1.2),
}


def measure() -> list[Row]:
    """Measure one update of a ResNet-50-like and a ViT-B-like module, with one thread and with two."""
    return over([_run() for _ in track(range(_RUNS), "averaging")])


def _run() -> list[Row]:
    rows: list[Row] = []
    before = torch.get_num_threads()
    for name, (make, rounds, bar) in _MODELS.items():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            suffix = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
            rows += _update(make(), suffix, rounds, bar)
            rows += _variants(make(), suffix, rounds)
            gc.collect()
    torch.set_num_threads(before)
    return rows


def _update(model: nn.Module, suffix: str, rounds: int, bar: float) -> list[Row]:
    plain, guarded = ModelEMA(model, Constant(0.999), guard=False), ModelEMA(model, Constant(0.999))
    average, weights = _flat(plain.ema)
    others = peers(model)
    floor, floor_and_look, update, update_guarded, *theirs = interleaved(
        rounds,
        lambda: average.lerp_(weights, 0.001),
        lambda: (weights.sum(), average.lerp_(weights, 0.001)),
        lambda: plain.update(model),
        lambda: guarded.update(model),
        *others.values(),
    )
    quickest = min(theirs)
    return [
        Row(f"ModelEMA.update, {suffix}", update * 1000, "ms", floor * 1000, bar),
        Row(
            f"… with the guard (floor: and one sum), {suffix}", update_guarded * 1000, "ms", floor_and_look * 1000, bar
        ),
        Row(f"… against the quickest of the others, {suffix}", update * 1000, "ms", quickest * 1000, 1.05),
        *(
            Row(f"… against {name}, {suffix}", update * 1000, "ms", seconds * 1000)
            for name, seconds in zip(others, theirs, strict=True)
        ),
    ]


def _variants(model: nn.Module, suffix: str, rounds: int) -> list[Row]:
    schedules = [Constant(0.9 + number / 100) for number in range(_VARIANTS)]
    together = ModelEMA(model, schedules[0], variants={str(each.decay): each for each in schedules[1:]})
    apart = [ModelEMA(model, each) for each in schedules]
    average, weights = _flat(together.ema)
    one_pass, passes, lerp, look = interleaved(
        rounds,
        lambda: together.update(model),
        lambda: [ema.update(model) for ema in apart],
        lambda: average.lerp_(weights, 0.001),
        weights.sum,
    )
    # A lerp reads two tensors and writes one. So many averages are read and written each, and the model is read once to
    # look at it and once to average it.
    unavoidable = look + lerp * (2 * _VARIANTS + 1) / 3
    one_pass *= 1000
    return [
        Row(
            f"{_VARIANTS} averages in one pass (floor: its traffic), {suffix}", one_pass, "ms", unavoidable * 1000, 1.2
        ),
        Row(f"… against {_VARIANTS} passes, {suffix}", one_pass, "ms", passes * 1000),
    ]


def _flat(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return an average and weights of as many numbers as the module averages, each in one piece of memory."""
    count = sum(tensor.numel() for tensor in module.state_dict().values() if tensor.is_floating_point())
    return torch.zeros(count), torch.ones(count)
