"""Tasks that tests train: quick ones, and one that a test can hold at a step of its choice."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from emaswap import Architecture, Signature, TensorField
from trainer.tasks import Batch, seeded

GATES = "TESTS_TASK_GATES"


class NoisyNet(nn.Module):
    """Dropout draws random numbers and batch norm counts: its weights depend on all of a run's state."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.layers(rows)
        return logits


class Noisy:
    """Whether the first number of a row is above the second.

    Where the folder that `TESTS_TASK_GATES` names holds a file named after a step, that step's batch waits until the
    file is gone, and says so with a file `<step>.reached`.
    """

    name = "noisy"

    def architecture(self) -> Architecture:
        return Architecture.of(NoisyNet)

    def signature(self) -> Signature:
        return Signature(
            inputs=(TensorField(name="rows", shape=(4,)),), outputs=(TensorField(name="logits", shape=(2,)),)
        )

    def build_model(self) -> nn.Module:
        return NoisyNet()

    def batch(self, step: int, size: int, seed: int) -> Batch:
        if folder := os.environ.get(GATES):
            _wait_at(Path(folder), step)
        return _rows(size, seed, step)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        rows, labels = batch
        return functional.cross_entropy(model(rows), labels)

    def evaluate(self, model: nn.Module, device: torch.device) -> Mapping[str, float]:
        rows, labels = (part.to(device) for part in _rows(200, -1))
        return {"accuracy": (model(rows).argmax(1) == labels).float().mean().item()}

    def probe(self) -> Tensor:
        return _rows(4, -2)[0]


class Nameless:
    """No task: most of one is missing."""

    name = "nameless"

    def build_model(self) -> nn.Module:
        return NoisyNet()


class Demanding(Noisy):
    """No task: it cannot be made without arguments."""

    def __init__(self, path: str) -> None:
        self.path = path


class Failing(Noisy):
    """A task whose data is not there."""

    def __init__(self) -> None:
        raise FileNotFoundError("no data in /nowhere")


def _rows(size: int, *parts: int) -> tuple[Tensor, Tensor]:
    rows = torch.randn(size, 4, generator=seeded(*parts))
    return rows, (rows[:, 0] > rows[:, 1]).long()


def _wait_at(folder: Path, step: int) -> None:
    gate = folder / str(step)
    if gate.exists():
        (folder / f"{step}.reached").touch()
        while gate.exists():
            time.sleep(0.005)
