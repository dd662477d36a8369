"""Build a module from a manifest, from trusted factories only, and fill it with verified weights.

A manifest chooses among code that the reader's own settings trust; it can never bring code.
"""

import importlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from emaswap.errors import BadVersion, EmaswapError, Reason
from emaswap.tensors import differences, in_words, named_tensors
from emaswap.versions.manifest import Architecture

TRUSTED_BY_DEFAULT = ("emaswap.models.*",)


def is_trusted(factory: str, trusted: Iterable[str]) -> bool:
    """Whether a factory is on the list: as itself ("package.module:name"), or in a package or below it ("package.*")."""
    module = factory.partition(":")[0]
    return any(
        factory == pattern or (pattern.endswith(".*") and f"{module}.".startswith(pattern.removesuffix("*")))
        for pattern in trusted
    )


def build(architecture: Architecture, *, trusted: Iterable[str] = TRUSTED_BY_DEFAULT) -> nn.Module:
    """A new module in eval mode, with the weights its factory gave it.

    Raises `BadVersion` when the factory is not trusted, cannot be imported, or does not return a module.
    """
    trusted = list(trusted)
    if not is_trusted(architecture.factory, trusted):
        raise BadVersion(
            Reason.UNTRUSTED_FACTORY,
            f"{architecture.factory} is not among the trusted factories ({', '.join(trusted)}); "
            f"if it should be, start the service with --trust {architecture.factory}",
        )
    module_name, _, name = architecture.factory.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), name)
        if architecture.factory not in trusted and getattr(factory, "__module__", None) != module_name:
            # Trusting a package is trusting what it defines, not all that it happens to import.
            raise BadVersion(
                Reason.UNTRUSTED_FACTORY, f"{architecture.factory} is imported from elsewhere into a trusted package"
            )
        module = factory(**architecture.arguments)
        if not isinstance(module, nn.Module):
            raise TypeError(f"it returned a {type(module).__name__}, not a torch.nn.Module")
    except BadVersion:
        raise
    except (Exception, SystemExit) as error:  # a factory is somebody else's code and may raise anything
        raise BadVersion(
            Reason.FACTORY_FAILED, f"{architecture.factory} failed: {type(error).__name__}: {error}"
        ) from error
    return module.eval().requires_grad_(False)


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module's parameters and persistent buffers; half precision is widened to the module's own.

    Raises `BadVersion` naming every tensor that is missing, unexpected, or of another shape or dtype.
    """
    try:
        own = named_tensors(module)
    except EmaswapError as error:
        raise BadVersion(Reason.FACTORY_FAILED, str(error)) from None
    if found := differences(own, tensors, dtypes=_holds):
        raise BadVersion(Reason(next(iter(found))), in_words(found))
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _holds(own: torch.dtype, given: torch.dtype) -> bool:
    """Whether a tensor can be copied without losing anything that was published."""
    return own == given or (own in _WIDE and given in _NARROW)


_WIDE, _NARROW = (torch.float32, torch.float64), (torch.float16, torch.bfloat16)
