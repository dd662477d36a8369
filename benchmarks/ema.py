"""How long an EMA update takes, against the memory traffic that it cannot avoid, and against the averages of others."""

import gc
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.models import resnet50_like, vit_b_like
from benchmarks.peers import peers
from benchmarks.report import Row
from benchmarks.timing import interleaved
from emaswap import Constant, ModelEMA

_VARIANTS = 4
_MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {"ResNet-50": (resnet50_like, 15), "ViT-B": (vit_b_like, 9)}


def measure() -> list[Row]:
    """One update of a ResNet-50-like and a ViT-B-like module, with one thread and with two."""
    rows: list[Row] = []
    before = torch.get_num_threads()
    for name, (make, rounds) in _MODELS.items():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            suffix = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
            rows += _update(make(), suffix, rounds)
            rows += _variants(make(), suffix, rounds)
            gc.collect()
    torch.set_num_threads(before)
    return rows


def _update(model: nn.Module, suffix: str, rounds: int) -> list[Row]:
    plain, guarded = ModelEMA(model, Constant(0.999), guard=False), ModelEMA(model, Constant(0.999))
    count = sum(tensor.numel() for tensor in plain.ema.state_dict().values() if tensor.is_floating_point())
    average, weights = torch.zeros(count), torch.ones(count)
    others = peers(model)
    floor, floor_and_look, update, update_guarded, *theirs = interleaved(
        rounds,
        lambda: average.lerp_(weights, 0.001),
        lambda: (weights.sum(), average.lerp_(weights, 0.001)),
        lambda: plain.update(model),
        lambda: guarded.update(model),
        *others.values(),
    )
    return [
        Row(f"ModelEMA.update, {suffix}", update * 1000, "ms", floor * 1000, 1.1),
        Row(
            f"… with the guard (floor: and one sum), {suffix}", update_guarded * 1000, "ms", floor_and_look * 1000, 1.1
        ),
        *(
            Row(
                f"ModelEMA.update against {name} ({seconds * 1000:.1f} ms), {suffix}",
                update * 1000,
                "ms",
                seconds * 1000,
                1.0,
            )
            for name, seconds in zip(others, theirs, strict=True)
        ),
    ]


def _variants(model: nn.Module, suffix: str, rounds: int) -> list[Row]:
    schedules = [Constant(0.9 + number / 100) for number in range(_VARIANTS)]
    together = ModelEMA(model, schedules[0], variants={str(each.decay): each for each in schedules[1:]})
    apart = [ModelEMA(model, each) for each in schedules]
    one_pass, passes = interleaved(
        rounds,
        lambda: together.update(model),
        lambda: [ema.update(model) for ema in apart],
    )
    return [
        Row(
            f"{_VARIANTS} averages in one pass against {_VARIANTS} passes, {suffix}",
            one_pass * 1000,
            "ms",
            passes * 1000,
            0.6,
        )
    ]
