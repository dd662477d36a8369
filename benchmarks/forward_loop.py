"""The floor of a model's server: the bare batched forward loop, at the batch size that suits it best."""

import json
import subprocess
import sys
import time

import torch
from torch import nn

from benchmarks import models

_SIZES = (8, 16, 32, 64, 128)
_SECONDS = 0.6


def best_rows_per_s(model: str, *, threads: int) -> float:
    """Return the rows a second of a network in `benchmarks.models`, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.forward_loop", model, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rates: dict[str, float] = json.loads(done.stdout)
    return max(rates.values())


def _rows_per_s(module: nn.Module, rows: torch.Tensor) -> float:
    with torch.inference_mode():
        for _ in range(10):
            module(rows)
        began, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - began) < _SECONDS:
            module(rows)
            count += 1
    return count * len(rows) / seconds


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    network = getattr(models, sys.argv[1])().eval()
    width = {"Mlp": 64, "Cnn": 784}[sys.argv[1]]
    print(json.dumps({size: _rows_per_s(network, torch.rand(size, width)) for size in _SIZES}))
