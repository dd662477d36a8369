"""The proof that a version is what it claims to be: verify its bytes in a module, and replay its probe.

Two steps, because a service shows which one a version is at, and times it. Where the bytes come from is not known here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emaswap.errors import BadVersion, Reason
from emaswap.files import tensor_file
from emaswap.tensors import dtype_name, named_tensors, not_finite
from emaswap.versions.architecture import build, fill
from emaswap.versions.manifest import Manifest
from emaswap.versions.probe import Probe, tolerances


@dataclass(frozen=True)
class Fetched:
    """The tensors of a version, their bytes verified against the digests in its manifest."""

    weights: dict[str, Tensor]
    probe: Probe


def check_size(manifest: Manifest, max_bytes: int | None = None) -> None:
    """Raise `BadVersion` when a manifest names a larger file than is allowed, or than the tensors in its table take."""
    weights = manifest.weights
    if max_bytes is not None and weights.size > max_bytes:
        raise BadVersion(
            Reason.TOO_LARGE, f"its weights file has {weights.size} bytes, and at most {max_bytes} are allowed here"
        )
    if not tensor_file.fits(weights.size, {name: (each.dtype, each.shape) for name, each in weights.tensors.items()}):
        raise BadVersion(
            Reason.MANIFEST_INVALID, f"it names a file of {weights.size} bytes, and the tensors in its table take fewer"
        )


def verify(
    manifest: Manifest, fetched: Fetched, *, trusted: Iterable[str], device: torch.device, adopt: bool = False
) -> nn.Module:
    """Return a module with the fetched weights in it; with `adopt`, in their own memory where that can be.

    Raises `BadVersion` when they are not finite or do not fit, `Short` when there is no memory for the module.
    """
    check(manifest, fetched.weights)
    return assemble(manifest, fetched.weights, trusted=trusted, device=device, adopt=adopt)


def check(manifest: Manifest, weights: Mapping[str, Tensor]) -> None:
    """Raise `BadVersion` when weights are not finite, or not those of the manifest's table."""
    if bad := not_finite(weights):
        raise BadVersion(Reason.NOT_FINITE, f"NaN or infinity in {', '.join(bad[:20])}")
    table = {name: (info.dtype, info.shape) for name, info in manifest.weights.tensors.items()}
    found = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in weights.items()}
    if different := sorted(name for name in table.keys() | found.keys() if table.get(name) != found.get(name)):
        raise BadVersion(
            Reason.MANIFEST_INVALID, f"its table of tensors is not that of the file: {', '.join(different[:20])}"
        )


def assemble(
    manifest: Manifest, weights: Mapping[str, Tensor], *, trusted: Iterable[str], device: torch.device, adopt: bool
) -> nn.Module:
    """Return a module with weights in it that have been checked. Raises as `verify` does when they do not fit."""
    module = build(manifest.architecture, trusted=trusted, like=weights)
    fill(module, weights, adopt=adopt)
    return module.to(device)


def replay(manifest: Manifest, probe: Probe, module: nn.Module, *, device: torch.device) -> dict[str, Tensor]:
    """Return the module's answers to the probe. Raises `BadVersion` when they are not those recorded at publishing.

    How far they may differ is this reader's to say; a manifest can only ask for less than is usual.
    """
    if not all(len(value) for value in probe.inputs.values() if value.dim()):
        raise BadVersion(Reason.PROBE_FAILED, "a probe of no rows proves nothing")
    tensors = named_tensors(module)
    own, usual = tolerances(tensors, device), tolerances(tensors, torch.device("cpu"))
    asked = manifest.probe.rtol, manifest.probe.atol
    rtol, atol = (mine if wish >= common else wish for wish, mine, common in zip(asked, own, usual, strict=True))
    outputs = probe.replay(module, manifest.signature)
    probe.compare(outputs, rtol=rtol, atol=atol)
    return outputs
