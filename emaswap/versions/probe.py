"""The probe: inputs, and the EMA model's own outputs for them, recorded when a version is published.

Every reader of the version replays the inputs and compares: the proof that what is served is what was trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emaswap.errors import BadVersion, EmaswapError, Reason, describe, is_interrupt
from emaswap.tensors import not_finite
from emaswap.versions.signature import Inputs, Signature

_INPUT, _OUTPUT = "input/", "output/"

# rtol and atol by dtype, of |served − recorded| ≤ atol + rtol·|recorded|. On one CPU the two are equal to the last bit;
# the room is for other vector units and thread counts, which sum in another order.
_TOLERANCES = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.bfloat16: (5e-2, 2e-2),
    torch.float16: (1e-2, 2e-3),
}
# TF32 and fused kernels keep about ten bits of mantissa.
_ON_GPU = (1e-2, 2e-3)


Rows = Tensor | NDArray[Any] | Sequence[Any]
"""Rows of one input: a tensor, an array, or nested lists of numbers."""


def to_inputs(given: Rows | Mapping[str, Rows]) -> Inputs:
    """Return copies of the inputs that a user gives for a probe, on the CPU.

    Raises `EmaswapError` unless they are rows of numbers, at least one, and as many in each input.
    """
    if not isinstance(given, Mapping):
        return _to_rows(given, "the probe")
    inputs = {str(name): _to_rows(rows, f"probe input {name!r}") for name, rows in given.items()}
    if len(counts := {name: len(rows) for name, rows in inputs.items()}) == 0 or len(set(counts.values())) > 1:
        raise EmaswapError(f"a probe needs the same number of rows in each input, got {counts or 'no inputs'}")
    return inputs


def _to_rows(given: object, name: str) -> Tensor:
    if isinstance(given, (list, tuple)) and any(isinstance(each, Tensor) for each in given):
        raise EmaswapError(
            f"{name} is a {type(given).__name__} of tensors: give one tensor, rows first (torch.stack), "
            "or several inputs by name: {'tokens': ..., 'mask': ...}"
        )
    try:
        rows = given if isinstance(given, Tensor) else _from_numpy(np.asarray(given))
    except (TypeError, ValueError) as error:
        raise EmaswapError(f"{name} is a {type(given).__name__} that cannot be made into a tensor: {error}") from None
    if isinstance(given, (list, tuple)) and rows.is_floating_point():
        rows = rows.to(torch.get_default_dtype())
    if rows.layout != torch.strided or rows.is_meta or rows.is_quantized:
        raise EmaswapError(
            f"{name} is not a plain tensor ({rows.layout}, {rows.device}, {rows.dtype}): give a dense one"
        )
    if rows.dim() == 0:
        raise EmaswapError(f"{name} is a single number: expected rows, the first dimension being the batch")
    if len(rows) == 0:
        raise EmaswapError(f"{name} has no rows, which proves nothing: give a few typical ones")
    return rows.detach().cpu().clone(memory_format=torch.contiguous_format)


def _from_numpy(array: NDArray[Any]) -> Tensor:
    # torch supports neither negative strides nor foreign byte orders.
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


@dataclass(frozen=True)
class Probe:
    """Inputs and recorded outputs by name, rows first."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @classmethod
    def record(cls, module: nn.Module, signature: Signature, inputs: Inputs) -> "Probe":
        """Run the module on the inputs and keep its outputs.

        Raises `EmaswapError` when they are not finite, `ValueError` when they do not fit the signature.
        """
        named = {name: value.clone() for name, value in signature.name_inputs(inputs).items()}
        if not all(len(value) for value in named.values()):
            raise EmaswapError("a probe of no rows proves nothing: give a few typical inputs")
        # Copies, because a module may work in place on what it is given.
        outputs = signature.run(module, {name: value.clone() for name, value in named.items()})
        signature.check_outputs(outputs)
        if bad := not_finite(outputs):
            raise EmaswapError(f"the model answers its own probe with values that are not finite: {', '.join(bad)}")
        return cls(named, outputs)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the probe as named tensors, for a tensor file."""
        return {_INPUT + name: value for name, value in self.inputs.items()} | {
            _OUTPUT + name: value for name, value in self.outputs.items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Probe":
        """Return the probe that a tensor file holds."""
        inputs, outputs = (
            {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
            for kind in (_INPUT, _OUTPUT)
        )
        return cls(inputs, outputs)

    def replay(self, module: nn.Module, signature: Signature) -> dict[str, Tensor]:
        """Return the module's outputs for the probe's inputs, on the CPU. Raises `BadVersion` when it cannot run them."""
        device = next((tensor.device for tensor in module.state_dict().values()), torch.device("cpu"))
        try:
            named = signature.name_inputs(self.inputs)
            outputs = signature.run(module, {name: value.to(device, copy=True) for name, value in named.items()})
        except BaseException as error:  # forward is somebody else's code and may raise anything
            if is_interrupt(error):
                raise
            raise BadVersion(Reason.PROBE_FAILED, f"the probe does not run: {describe(error)}") from error
        return {name: output.cpu() for name, output in outputs.items()}

    def compare(self, outputs: Mapping[str, Tensor], *, rtol: float, atol: float) -> None:
        """Raise `BadVersion` when outputs differ from the recorded ones by more than atol + rtol·|recorded|."""
        if outputs.keys() != self.outputs.keys():
            raise BadVersion(
                Reason.PROBE_FAILED, f"recorded outputs {sorted(self.outputs)}, replayed {sorted(outputs)}"
            )
        for name, recorded in self.outputs.items():
            output = outputs[name]
            if output.shape != recorded.shape or output.dtype != recorded.dtype:
                raise BadVersion(
                    Reason.PROBE_MISMATCH,
                    f"output {name!r}: recorded {recorded.dtype}{list(recorded.shape)}, "
                    f"replayed {output.dtype}{list(output.shape)}",
                )
            if not torch.allclose(output.double(), recorded.double(), rtol=rtol, atol=atol):
                worst = (output.double() - recorded.double()).abs().max().item()
                raise BadVersion(
                    Reason.PROBE_MISMATCH,
                    f"output {name!r} differs from the one recorded at publishing by up to {worst:.3g} "
                    f"(allowed: {atol:g} + {rtol:g} × |recorded|): what was loaded is not what was trained",
                )


def tolerances(tensors: Mapping[str, Tensor], device: torch.device) -> tuple[float, float]:
    """Return how far the outputs of a model with these weights may differ on this device, as rtol and atol."""
    candidates = [_TOLERANCES[tensor.dtype] for tensor in tensors.values() if tensor.dtype in _TOLERANCES]
    if device.type != "cpu":
        candidates.append(_ON_GPU)
    rtol, atol = zip(*candidates, strict=True) if candidates else ((0.0,), (0.0,))
    return max(rtol), max(atol)


def drift(outputs: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Return the mean |difference| of two sets of outputs over their common names: how far a version moves them."""
    differences = [
        (outputs[name].double() - others[name].double()).abs().flatten()
        for name in outputs.keys() & others.keys()
        if outputs[name].shape == others[name].shape
    ]
    together = torch.cat(differences) if differences else torch.empty(0)
    return float(together.mean()) if len(together) else 0.0
