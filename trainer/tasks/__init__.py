"""What there is to train. A task brings the model, the data, the loss and the evaluation; the loop does the rest."""

import hashlib
import importlib
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from emaswap import Architecture, EmaswapError, Signature

_BUILT_IN = {"digits": "trainer.tasks.digits:Digits", "mnist5k": "trainer.tasks.mnist5k:Mnist5k"}

Batch = tuple[Tensor, ...]


class Task(Protocol):
    """Implement these in a class of your own and train it with `--task package.module:Class`.

    The class is made without arguments. `architecture` must name a factory that the service can import and trusts
    (`python -m service --trust package.module:factory`).
    """

    name: str
    """The model's name: in the manifest and in every answer."""

    def architecture(self) -> Architecture:
        """How a service builds the module."""
        ...

    def signature(self) -> Signature:
        """Names, dtypes and shapes of inputs and outputs, for one row."""
        ...

    def build_model(self) -> nn.Module:
        """The module to train, with fresh weights from torch's random state."""
        ...

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """The training batch of a step (from 0), on the CPU: a function of its arguments alone.

        That is what lets a killed run go on bit-exactly: no iterator's position has to be saved. See `seeded`.
        """
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar to minimise; the batch is on the model's device."""
        ...

    def evaluate(self, model: nn.Module, device: torch.device) -> Mapping[str, float]:
        """Metrics of a model in eval mode on held-out data, by name: "accuracy" shows in the progress bar."""
        ...

    def probe(self) -> Tensor | Mapping[str, Tensor]:
        """A few typical inputs, rows first."""
        ...


def find_task(name: str) -> Task:
    """A built-in task by name, or a class by its import path. Raises `EmaswapError` when there is none."""
    path = _BUILT_IN.get(name, name)
    module, _, cls = path.partition(":")
    if not module or not cls:
        raise EmaswapError(f"unknown task {name!r}: expected one of {sorted(_BUILT_IN)}, or package.module:Class")
    try:
        task: Task = getattr(importlib.import_module(module), cls)()
    except Exception as error:  # a task is somebody else's code and may raise anything
        raise EmaswapError(f"cannot load task {name!r}: {type(error).__name__}: {error}") from error
    missing = [part for part in _PARTS if not hasattr(task, part)]
    if missing:
        raise EmaswapError(f"{path} is no task: it lacks {', '.join(missing)}")
    return task


_PARTS = ("name", "architecture", "signature", "build_model", "batch", "loss", "evaluate", "probe")


def seeded(*parts: int) -> torch.Generator:
    """A generator whose numbers depend on just these integers, such as a seed and a step."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
