"""The rehearsal: run the probe through the factory's module when a publisher is made.

It finds what could never be published or served, and says what to do, before training has begun.
"""

import io
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from emaswap.errors import BadVersion, EmaswapError, PublishError
from emaswap.files import tensor_file
from emaswap.tensors import named_tensors, not_finite
from emaswap.versions.architecture import Architecture, build, widen
from emaswap.versions.probe import Rows, to_inputs, tolerances
from emaswap.versions.signature import Inputs, Signature

log = logging.getLogger(__name__)

_STORED_IN = (torch.float32, torch.bfloat16, torch.float16)
# How far answers may differ for numerical reasons, as a fraction of the largest.
_OTHER_ROWS = 0.05
# A model that samples may draw the same sample twice.
_DRAWS = 5


@dataclass(frozen=True)
class Rehearsal:
    """The module that the factory builds, in eval mode on the CPU, with the inputs and signature it was run with."""

    module: nn.Module
    signature: Signature
    inputs: dict[str, Tensor]


def rehearse(
    architecture: Architecture,
    probe: Rows | Mapping[str, Rows],
    *,
    signature: Signature | None = None,
    dtype: torch.dtype | None = None,
) -> Rehearsal:
    """Run the probe through the factory's module as every service will, several times.

    The random state is restored afterwards, so that training is not affected.

    Args:
        architecture: the factory and its arguments.
        probe: the probe inputs as the user gives them.
        signature: of the module; by default what the probe shows.
        dtype: what a module in half precision is widened to, if it is wider.

    Raises `PublishError` when it fails, or when the answers are not a function of weights and inputs.
    """
    # Versions are proven and served without inference mode and autocast.
    with _own_random_numbers(), torch.inference_mode(mode=False), torch.autocast("cpu", enabled=False):
        module = _built(architecture, dtype)
        try:
            signature, inputs = _first_run(module, to_inputs(probe), signature)
            answers = _run_again(module, signature, inputs)
            _run_other_rows(module, signature, inputs, answers)
        except Exception as error:  # forward is somebody else's code and may raise anything
            message = str(error) if isinstance(error, EmaswapError) else f"{type(error).__name__}: {error}"
            raise PublishError(
                f"the module that {architecture.factory} builds cannot be published with this probe: {message}"
            ) from error
    return Rehearsal(module, signature, inputs)


def _built(architecture: Architecture, dtype: torch.dtype | None) -> nn.Module:
    if dtype is not None and dtype not in _STORED_IN:
        raise PublishError(
            f"dtype={dtype}: expected one of {', '.join(map(str, _STORED_IN))}, or nothing to store what the factory builds"
        )
    factory = architecture.factory
    if factory.startswith("__main__:"):
        raise PublishError(f"no service can import {factory}: move the class into a module of its own")
    try:
        module = build(architecture, trusted=[factory]).cpu()
        if dtype == torch.float32:
            widen(module, dtype)
        # Nothing is stored; this says whether it could be.
        tensor_file.write(io.BytesIO(), {name: tensor.new_empty(0) for name, tensor in named_tensors(module).items()})
    except BadVersion as error:
        raise PublishError(f"no service could build the published module: {error.detail}") from error
    # A parameter may hold anything before it is filled; a buffer that begins so, as a mask, stays so.
    parameters = dict(module.named_parameters())
    buffers = {name: tensor for name, tensor in named_tensors(module).items() if name not in parameters}
    if bad := not_finite(buffers):
        raise PublishError(
            f"services reject state that is not finite, and {factory} builds a module with such: {', '.join(bad[:5])}; "
            "register a mask of infinities with register_buffer(..., persistent=False)"
        )
    return module


def _first_run(module: nn.Module, inputs: Inputs, signature: Signature | None) -> tuple[Signature, dict[str, Tensor]]:
    """Return the signature and the inputs; floating-point inputs that do not run are converted to the weights' dtype."""
    if signature is not None:
        named = signature.name_inputs(_as_declared(inputs, signature))
        signature.check_outputs(signature.run(module, _copies(named)))
        return signature, named
    try:
        found = Signature.infer(module, inputs)
    except Exception:
        converted = _as_weights(inputs, module)
        if converted is None:
            raise
        inputs, found = converted, Signature.infer(module, converted)
    return found, found.name_inputs(inputs)


def _as_declared(inputs: Inputs, signature: Signature) -> Inputs:
    """Convert floating-point inputs to the dtypes that a signature has for them."""
    dtypes = {field.name: field.torch_dtype for field in signature.inputs}
    if isinstance(inputs, Tensor):
        return _converted(inputs, dtypes[signature.inputs[0].name])
    return {name: _converted(rows, dtypes.get(name, rows.dtype)) for name, rows in inputs.items()}


def _as_weights(inputs: Inputs, module: nn.Module) -> Inputs | None:
    """Convert floating-point inputs to the dtype of the weights; `None` where that changes nothing."""
    dtype = next((each.dtype for each in module.parameters() if each.is_floating_point()), None)
    every = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
    if dtype is None or all(rows.dtype == dtype or not rows.is_floating_point() for rows in every):
        return None
    if isinstance(inputs, Tensor):
        return _converted(inputs, dtype)
    return {name: _converted(rows, dtype) for name, rows in inputs.items()}


def _converted(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.to(dtype) if rows.is_floating_point() and dtype.is_floating_point else rows


def _run_again(module: nn.Module, signature: Signature, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the probe several times and return the answers. They must be the same, and no state may change."""
    bound = signature.bind(module)
    rtol, atol = tolerances(named_tensors(module), torch.device("cpu"))
    state, random_state = _state(module), _random_state()
    first = bound(_copies(inputs))
    draws = random_state != _random_state()
    for _ in range(_DRAWS if draws else 1):
        with torch.inference_mode():  # as requests are answered
            again = bound(_copies(inputs))
        if changed := [name for name, tensor in _state(module).items() if not _is_same(state.get(name), tensor)]:
            raise PublishError(
                f"forward changes {', '.join(sorted(changed)[:5])} in eval mode, so that answers would depend on "
                "earlier requests: do that only `if self.training`"
            )
        if other := [name for name in first if not _is_close(first[name], again[name], rtol, atol)]:
            why = (
                "forward draws random numbers: make dropout depend on self.training, and sample outside of forward"
                if draws
                else "forward keeps state between calls or depends on the time: make it depend on its inputs alone"
            )
            raise PublishError(f"the same probe is answered differently each time (output {other[0]!r}): {why}")
    return first


def _run_other_rows(
    module: nn.Module, signature: Signature, inputs: dict[str, Tensor], together: dict[str, Tensor]
) -> None:
    """Run another number of rows: a service batches as many as have arrived."""
    rows = len(next(iter(inputs.values())))
    others = {name: batch[:1] if rows > 1 else torch.cat([batch, batch]) for name, batch in inputs.items()}
    try:
        alone = signature.run(module, _copies(others))
    except Exception as error:  # forward is somebody else's code and may raise anything
        raise PublishError(
            f"forward runs {rows} rows but not {len(next(iter(others.values())))} ({error}): make it take any number of rows"
        ) from error
    for name, answers in together.items():
        first, again = answers[:1].double(), alone[name][:1].double()
        if answers.is_floating_point() and first.shape == again.shape and first.numel():
            difference = (first - again).abs().max()
            if difference > _OTHER_ROWS * answers.double().abs().max():
                log.warning(
                    "output %r of a row differs by %.3g when the row runs alone: a service runs rows of several requests "
                    "together, so answers would depend on other requests",
                    name,
                    difference.item(),
                )


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of a module's buffers, persistent or not, and the identities and versions of its parameters."""
    versions = {
        name: torch.tensor([id(parameter), parameter._version]) for name, parameter in module.named_parameters()
    }
    return versions | {name: buffer.clone() for name, buffer in module.named_buffers()}


def _is_same(before: Tensor | None, after: Tensor) -> bool:
    if before is None or before.shape != after.shape or before.dtype != after.dtype:
        return False
    equal = before == after
    return bool((equal | ((before != before) & (after != after))).all())  # noqa: PLR0124


def _is_close(first: Tensor, again: Tensor, rtol: float, atol: float) -> bool:
    return first.shape == again.shape and torch.allclose(
        first.double(), again.double(), rtol=rtol, atol=atol, equal_nan=True
    )


def _copies(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies, because a module may work in place on what it is given."""
    return {name: rows.clone() for name, rows in inputs.items()}


def _random_state() -> tuple[object, ...]:
    """Return the random state of Python, NumPy and torch."""
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().numpy().tobytes()  # noqa: NPY002


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch at the end."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
