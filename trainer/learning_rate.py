"""The learning rate as a function of the optimizer step, given as a factor of its peak."""

import math


def warmup_and_cosine(step: int, *, warmup: int, steps: int, final: float = 0.0) -> float:
    """Rise linearly over `warmup` steps, then fall along a half cosine to `final`, reached after `steps` steps.

    Without an end (`steps` 0) the factor stays at 1.
    """
    if step < warmup or not steps:
        return warmup_and_constant(step, warmup=warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def warmup_and_constant(step: int, *, warmup: int) -> float:
    """Rise linearly over `warmup` steps to 1, and stay there."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0
