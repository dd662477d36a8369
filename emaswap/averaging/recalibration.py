"""Recalibration of batch norm: running statistics measured with the averaged weights, rather than averaged themselves."""

import inspect
from collections.abc import Iterable, Mapping
from inspect import Parameter, Signature
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from emaswap.averaging.averaged_module import unwrap
from emaswap.errors import EmaError


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable[Any]) -> None:
    """Set every batch norm's running mean and variance to the mean over these batches, as a `DataLoader` yields them.

    Statistics that were averaged over training belong to weights of the past; these belong to the weights as they are
    (stochastic weight averaging, arXiv 1803.05407, section 3.1). Every other layer stays in eval mode, so that dropout
    neither changes the statistics nor draws random numbers. Without batch norm, nothing runs; one that does not run for
    any batch, or that the module itself keeps in eval mode, keeps the statistics that it has.

    Args:
        module: the module to change, as it is published or evaluated.
        batches: the inputs of `forward`, rows first, moved to the module's device. Each is a tensor; or a list or tuple,
            of which `forward` gets as many as it requires, so that labels behind them are left out; or a mapping, of
            which it gets those that it has a parameter for.

    Raises `EmaError` when there is no batch, or one is empty or something else, and for statistics that cannot be measured
    so: of scripted modules, and of instance norm. The statistics are as before whenever this raises.
    """
    unwrapped = unwrap(module)
    norms = _norms(module)
    if not norms:
        return
    device = next(chain(module.parameters(), module.buffers())).device
    signature = inspect.signature(unwrapped.forward)
    if not isinstance(batches, Iterable):
        raise EmaError(f"the batches are an iterable of them, as a DataLoader is, got {type(batches).__name__}")
    before = [{name: tensor.clone() for name, tensor in norm.named_buffers()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    done = False
    try:
        _evaluate(module)
        for norm, buffers in zip(norms, before, strict=True):
            # The first batch takes the place of these: one that stays in eval mode goes on normalizing by them.
            if not all(bool(tensor.isfinite().all()) for tensor in buffers.values()):
                norm.reset_running_stats()
            norm.num_batches_tracked.zero_()  # type: ignore[union-attr]
            norm.momentum = None  # the plain mean over all batches
            norm.train()
        for number, batch in enumerate(batches, 1):
            inputs, named = _inputs(batch, signature, f"batch {number}")
            module(*(each.to(device) for each in inputs), **{name: each.to(device) for name, each in named.items()})
            done = True
        _restore((norm, buffers) for norm, buffers in zip(norms, before, strict=True) if not norm.num_batches_tracked)
        if not done:
            raise EmaError("there was no batch to recalibrate with: an iterator that is used up must be made again")
        if not all(bool(tensor.isfinite().all()) for norm in norms for tensor in norm.buffers()):
            raise EmaError("the statistics of these batches are not finite: look for NaNs and infinities in them")
    except BaseException:
        _restore(zip(norms, before, strict=True))
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        _evaluate(module)


def _evaluate(module: nn.Module) -> None:
    """Put a module into eval mode, also the parts of one that does not hand it on."""
    module.eval()
    for each in module.modules():
        each.training = False


def _norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms that keep running statistics."""
    for name, each in module.named_modules():
        names = {key for key, _ in each.named_buffers(recurse=False)}
        if isinstance(each, torch.jit.ScriptModule) and "running_mean" in names:
            raise EmaError(
                f"{name or 'the module'} is scripted, and its statistics cannot be set: recalibrate before scripting"
            )
        if isinstance(each, _InstanceNorm) and "running_mean" in names:
            raise EmaError(
                f"{name or 'the module'} is an {type(each).__name__}, whose running statistics cannot be measured batch by "
                "batch: make it with track_running_stats=False, or leave the statistics averaged"
            )
        if isinstance(each, _BatchNorm) and any(is_lazy(held) or held.is_meta for held in each.buffers()):
            raise EmaError(f"{name or 'the module'} has no statistics yet: materialize the module, or run it once")
    return [each for each in module.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]


def _restore(norms: Iterable[tuple[_BatchNorm, Mapping[str, Tensor]]]) -> None:
    """Give batch norms the statistics that they had."""
    for norm, buffers in norms:
        norm.load_state_dict({**norm.state_dict(), **buffers})


def _inputs(batch: object, signature: Signature, what: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return what `forward` gets of a batch, by position and by name."""
    inputs, named = _chosen(batch, list(signature.parameters.values()), what)
    try:
        signature.bind(*inputs, **named)
    except TypeError as error:
        raise EmaError(f"{what} does not give forward{signature} what it requires: {error}") from None
    if all(not each.numel() for each in (*inputs, *named.values())):
        raise EmaError(f"{what} is empty, and would count as much as any other: leave it out")
    return inputs, named


def _chosen(batch: object, parameters: list[Parameter], what: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    if isinstance(batch, Mapping):
        takes_any = any(each.kind is Parameter.VAR_KEYWORD for each in parameters)
        names = {
            each.name for each in parameters if each.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        }
        named = {str(name): value for name, value in batch.items() if name in names or takes_any}
        if not named:
            raise EmaError(
                f"{what} has {', '.join(map(str, batch)) or 'nothing'}, and forward takes {', '.join(sorted(names))}"
            )
        _check_tensors(named, what)
        return [], named
    given: list[Any] = list(batch) if isinstance(batch, (list, tuple)) else [batch]
    positional = [
        each for each in parameters if each.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    ]
    required = sum(each.default is Parameter.empty for each in positional)
    if len(given) < required or not given:
        raise EmaError(f"{what} has {len(given)} tensors, and forward requires {required}")
    if len(given) > max(required, 1) and any(each.kind is Parameter.VAR_POSITIONAL for each in parameters):
        raise EmaError(
            f"{what} has {len(given)} tensors, and forward takes any number of them, so that nobody knows which are inputs: "
            "yield the inputs alone, or name the parameters of forward"
        )
    given = given[: max(required, 1)]
    _check_tensors(dict(enumerate(given)), what)
    return given, {}


def _check_tensors(values: Mapping[Any, object], what: str) -> None:
    for place, value in values.items():
        if not isinstance(value, Tensor):
            raise EmaError(
                f"{what} holds a {type(value).__name__} at {place!r}, expected a tensor; a batch is a tensor, a list or "
                "tuple of them, or a mapping of them by name"
            )
