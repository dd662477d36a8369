"""Numerical precision of training: autocast, loss scaling, TF32 and deterministic algorithms."""

import contextlib
import os
from dataclasses import dataclass
from typing import Self

import torch
from torch.amp.grad_scaler import GradScaler

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The precision of autocast on a device: "fp32" (no autocast), "bf16" or "fp16"."""

    name: str
    device: torch.device

    @classmethod
    def of(cls, name: str, device: torch.device) -> Self:
        """Return the precision that a name or "auto" means: bf16 on CUDA if the device supports it, fp32 on the CPU."""
        if name != "auto":
            return cls(name, device)
        if device.type != "cuda":
            return cls("fp32", device)
        return cls("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16", device)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context for a forward pass."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, _AUTOCAST[self.name])

    def scaler(self) -> GradScaler:
        """Return a scaler that keeps small fp16 gradients from vanishing, and skips steps whose gradients overflow."""
        return GradScaler(self.device.type, enabled=self.name == "fp16")


def set_float32(device: torch.device, *, tf32: bool) -> None:
    """Set whether a CUDA device rounds float32 to TF32 in matrix products and convolutions."""
    if device.type != "cuda":
        return  # some CPUs would round as well
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    # Not the newer `fp32_precision`: torch itself reads this flag, and raises if only convolutions use the newer one.
    torch.backends.cudnn.allow_tf32 = tf32


def set_deterministic() -> None:
    """Allow only deterministic algorithms. Call this before CUDA starts, since CUDA reads an environment variable then."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
