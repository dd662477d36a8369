"""The random numbers of a step: a function of the seed, the step and the rank, as its batch is of seed and step.

So there is no random state to save, evaluation may draw what it likes, and no two ranks drop out the same units.
"""

import random

import numpy as np
import torch

from trainer.tasks import seeded


def seed_run(seed: int) -> None:
    """For what is made before the first step: the initial weights, which are the same on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (what user code without a Generator draws from)
    torch.manual_seed(seed)


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """For a step: Python, numpy, torch, and the CUDA device that it is made on."""
    # Four numbers, as tasks seed their batches with up to three.
    number = seeded(seed, step, rank, 0).initial_seed()
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
