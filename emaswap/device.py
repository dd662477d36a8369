"""Where torch computes."""

import torch

from emaswap.errors import EmaswapError


def pick_device(name: str) -> torch.device:
    """Return the device that "auto", "cpu" or "cuda" means. Raises `EmaswapError` when it is CUDA and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise EmaswapError("--device cuda: torch sees no CUDA device here; use --device auto or cpu")
    return torch.device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")
