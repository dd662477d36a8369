"""Batch norm over the rows of all ranks, so that splitting a batch over ranks does not change what is learned."""

import logging
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

log = logging.getLogger(__name__)


def synchronise(model: nn.Module) -> None:
    """Make every batch norm of a model train on the statistics of all ranks' rows, from now on.

    Only the class of each layer changes: the layer keeps its place, name, parameters and buffers. On CUDA the class is
    torch's own. A subclass with its own `forward` is left alone, with a warning, because torch's SyncBatchNorm would
    drop what that `forward` adds.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, _BatchNorm) or isinstance(layer, (SyncBatchNorm, nn.SyncBatchNorm)):
            continue
        if type(layer).forward is not _BatchNorm.forward:
            log.warning(
                "%s (%s) has its own forward: it normalises each rank's rows separately", name, type(layer).__name__
            )
        elif any(tensor.is_cuda for tensor in (*layer.parameters(), *layer.buffers())):
            layer.__class__ = nn.SyncBatchNorm
            vars(layer)["process_group"] = None  # the default group
        else:
            layer.__class__ = SyncBatchNorm


class SyncBatchNorm(_BatchNorm):
    """What `nn.SyncBatchNorm` is on CUDA, for any device and number of dimensions: (N, C, ...) to the same shape."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        return self._synchronised(input) if self.training else super().forward(input)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        pass

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _synchronised(self, rows: Tensor) -> Tensor:
        values = rows if rows.dtype == torch.float64 else rows.float()
        dims = [0, *range(2, rows.dim())]
        across = (1, -1, *[1] * (rows.dim() - 2))
        own = values.new_full((1,), values.numel() / values.shape[1])
        # Two passes, since E[x²] − E[x]² suffers from cancellation.
        totals = _over_ranks(torch.cat([values.sum(dims), own]))
        mean, count = totals[:-1] / totals[-1], totals[-1]
        centred = values - mean.view(across)
        variance = _over_ranks(centred.square().sum(dims)) / count
        self._track(mean.detach(), (variance * (count / (count - 1))).detach())
        normal = centred * (variance + self.eps).rsqrt().view(across)
        if self.affine:
            normal = normal * self.weight.view(across) + self.bias.view(across)
        return normal.to(rows.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(variance.to(self.running_var), momentum)


class _Sum(torch.autograd.Function):
    """The sum of all ranks' tensors. Every rank's loss depends on the sum, so its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:  # noqa: ARG004
        return _sum(own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # noqa: ARG004
        return _sum(gradient)


def _over_ranks(own: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(own)  # type: ignore[no-untyped-call]
    return total


def _sum(own: Tensor) -> Tensor:
    total = own.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total
