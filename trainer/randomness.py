"""Random numbers of a step: a function of seed, step and rank, just as its batch is a function of seed and step.

So there is no random state to save, evaluation may draw any numbers, and no two ranks drop out the same units.
"""

import random

import numpy as np
import torch

from trainer.tasks import seeded


def seed_run(seed: int) -> None:
    """Seed what precedes the first step: the initial weights, which are the same on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (user code without a Generator draws from it)
    torch.manual_seed(seed)


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed a step: Python, numpy, torch, and the CUDA device the step runs on."""
    # Four numbers, since tasks seed their batches with up to three.
    number = seeded(seed, step, rank, 0).initial_seed()
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
