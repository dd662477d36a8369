"""Tasks: what to train. A task brings the model, the data, the loss and the evaluation; the loop does the rest."""

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
    """The interface of a task. Train a class of your own that implements it with `--task package.module:Class`.

    The class is called without arguments. `architecture` must name a factory that the service can import and trusts
    (`python -m service --trust package.module:factory`).
    """

    name: str
    """The model's name in the manifest and in every answer."""

    def architecture(self) -> Architecture:
        """Return how a service builds the module."""
        ...

    def signature(self) -> Signature:
        """Return names, dtypes and shapes of inputs and outputs, for one row."""
        ...

    def build_model(self) -> nn.Module:
        """Return the module to train, with fresh weights drawn from torch's random state."""
        ...

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """Return the training batch of a step (from 0), on the CPU, as a function of the arguments alone.

        So a killed run resumes bit-exactly without saving an iterator's position. See `seeded`.
        """
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scalar to minimise; the batch is on the model's device."""
        ...

    def evaluate(self, model: nn.Module, device: torch.device) -> Mapping[str, float]:
        """Return metrics, by name, of a model in eval mode on held-out data. The display shows "accuracy"."""
        ...

    def probe(self) -> Tensor | Mapping[str, Tensor]:
        """Return a few typical inputs, rows first."""
        ...


def find_task(name: str) -> Task:
    """Return a built-in task by name, or one of your own by import path. Raises `EmaswapError` if there is none."""
    path = _BUILT_IN.get(name, name)
    module, _, cls = path.partition(":")
    if not module or not cls:
        raise EmaswapError(f"unknown task {name!r}: expected {', '.join(sorted(_BUILT_IN))}, or package.module:Class")
    try:
        task: Task = getattr(importlib.import_module(module), cls)()
    except Exception as error:  # a user's task may raise anything
        raise EmaswapError(f"cannot load task {name!r}: {type(error).__name__}: {error}") from error
    missing = [part for part in _PARTS if not hasattr(task, part)]
    if missing:
        raise EmaswapError(f"{path} is not a task: it lacks {', '.join(missing)}")
    return task


_PARTS = ("name", "architecture", "signature", "build_model", "batch", "loss", "evaluate", "probe")


def seeded(*parts: int) -> torch.Generator:
    """Return a generator whose numbers depend only on these integers, such as a seed and a step."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
