"""How the learning rate goes with the number of optimizer steps: factors of its peak, as pure functions."""

import math


def warmup_and_cosine(step: int, *, warmup: int, steps: int, final: float = 0.0) -> float:
    """Rising linearly over `warmup` steps, then falling as a half cosine to `final`, which is reached after `steps`.

    Without an end (`steps` 0) it stays at its peak.
    """
    if step < warmup or not steps:
        return warmup_and_constant(step, warmup=warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def warmup_and_constant(step: int, *, warmup: int) -> float:
    """Rising linearly over `warmup` steps to stay there."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0
