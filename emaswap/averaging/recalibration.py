"""Recalibration of batch norm: running statistics measured with the averaged weights, rather than averaged themselves."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable[Tensor | tuple[Tensor, ...]]) -> None:
    """Set every batch norm's running mean and variance to the mean over these batches (inputs of `forward`, rows first).

    Statistics that were averaged over training belong to weights of the past; these belong to the weights as they are
    (stochastic weight averaging, arXiv 1803.05407, section 3.1). Every other layer stays in eval mode, so that dropout
    neither changes the statistics nor draws random numbers. Without batch norm, nothing runs.
    """
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]
    if not norms:
        return
    module.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    try:
        for batch in batches:
            module(*batch) if isinstance(batch, tuple) else module(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        module.eval()
