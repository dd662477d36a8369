"""The module that an average is kept in: made of a model, with its present state, and fit to be averaged."""

import copy
import sys
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from emaswap.averaging.held import Held, why_not_averaged
from emaswap.averaging.plan import Plan
from emaswap.errors import EmaError
from emaswap.tensors import plain_name


def averaged_module(
    model: nn.Module,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    factory: Callable[[], nn.Module] | None,
) -> nn.Module:
    """Return a module like the model, with its present state, to average in. Raises `EmaError` when none can be made."""
    check_averageable(model)
    check_device(device)
    if factory is None:
        try:
            average = copy.deepcopy(model)
        except Exception as error:  # whatever keeps a module from being copied, the way out is the same
            raise EmaError(
                f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: {error}): "
                "give ModelEMA(..., factory=...) that makes another one"
            ) from error
    else:
        average = unwrap(factory())
        if average is model:
            raise EmaError("factory=... must make another module: it returned the model itself")
        check_averageable(average)
        reshard(model)
        with torch.no_grad():
            for weight, initial in Plan([average], model, buffers="copy", exclude=()).pairs(0):
                initial.copy_(weight)
    average.eval().requires_grad_(False)
    convert(average, device, dtype)
    return average


def check_device(device: object) -> None:
    """Raise `EmaError` for a device that torch does not know or has not got."""
    try:
        torch.empty(0, device=device)  # type: ignore[call-overload]
    except Exception as error:  # each device says in its own way that it is not there
        raise EmaError(f"a device is one of torch's, as 'cpu' or 'cuda:0', got {device!r}: {error}") from error


def convert(average: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Move an average to a device, and its floating-point state to a dtype; half precision to float32 if none is named."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise EmaError(f"an average is kept in a floating-point dtype of torch of at least 16 bits, got {dtype}")
    average._apply(lambda tensor: tensor.to(device, _averaged_dtype(tensor, dtype)))  # type: ignore[no-untyped-call]


def reshard(module: nn.Module) -> None:
    """Let FSDP2 give up weights that it has gathered for a forward pass, and go back to the shards they came from."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return  # where it was not imported, nothing is sharded by it
    for child in module.modules():
        if isinstance(child, fsdp.FSDPModule):
            child.reshard()


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside `DataParallel`, `DistributedDataParallel` and `torch.compile`, however nested."""
    while isinstance(model, nn.Module):
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules and isinstance(inner := model._modules["_orig_mod"], nn.Module):
            model = inner
        else:
            return model
    raise EmaError(f"expected a torch.nn.Module, got {type(model).__name__}")


def as_names(names: object, option: str) -> tuple[str, ...]:
    """Return one name or several as a tuple. Raises `EmaError` for what is neither."""
    found = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, Iterable) else (names,)
    if wrong := [name for name in found if not isinstance(name, str)]:
        raise EmaError(f"{option} takes a name or several, got {wrong[0]!r}")
    return found


def check_named(patterns: Iterable[str], module: nn.Module) -> None:
    """Raise `EmaError` for a pattern that names no tensor: a misspelt one would be averaged in silence."""
    names = Held(module).state()  # and not those of `state_dict()`, which hooks may rename
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise EmaError(
                f"exclude={pattern!r} names nothing that is averaged: there are {', '.join(list(names)[:10])} ..."
            )


def check_averageable(model: nn.Module) -> None:
    """Raise `EmaError` for a model whose state cannot be averaged, naming the part and what to do about it."""
    for name, child in model.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise EmaError(
                f"{name or 'the model'} is scripted, and TorchScript does not hand out its tensors: average the module "
                "that was scripted, and script `ema.ema` afterwards"
            )
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and (problem := _problem(tensor)):
            raise EmaError(f"{plain_name(name)} cannot be averaged: {problem}")


def _problem(tensor: Tensor) -> str | None:
    """Return why a tensor cannot be averaged, and what to do."""
    if is_lazy(tensor):
        return "it is not initialized yet; run a forward pass before making the ModelEMA"
    if tensor.is_meta:
        return "it is on the meta device, without memory; materialize the model first"
    return why_not_averaged(tensor)


def _averaged_dtype(tensor: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """Return float32 for half precision: at a decay of 0.9999, bfloat16 has too few digits to move at all."""
    if tensor.is_complex():
        return torch.promote_types(tensor.dtype, torch.complex64)
    if not tensor.is_floating_point():
        return tensor.dtype
    return wanted or (torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype)
