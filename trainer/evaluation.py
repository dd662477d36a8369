"""Evaluation of the raw and the averaged weights side by side."""

from collections.abc import Mapping

import torch
from torch import nn

from emaswap import ModelEMA
from trainer.precision import Precision
from trainer.tasks import Task


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, ema: ModelEMA, precision: Precision) -> dict[str, float]:
    """Return the task's metrics of the raw weights and of each average: "raw_...", "ema_...", "ema_<variant>_..."."""
    averages = {"ema": ema.ema} | {f"ema_{name}": module for name, module in ema.variants.items()}
    metrics: dict[str, float] = {}
    for kind, module in {"raw": model.eval(), **averages}.items():
        with precision.autocast():
            measured: Mapping[str, float] = task.evaluate(module, precision.device)
        metrics |= {f"{kind}_{name}": value for name, value in measured.items()}
    return metrics
