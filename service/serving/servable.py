"""A served version, and a servable: one that this process can answer with. Going live is a reference being assigned."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emaswap import BadVersion, Manifest, Signature
from emaswap.versions import proof
from emaswap.versions.probe import Probe, drift
from emaswap.versions.signature import Bound

Rows = dict[str, NDArray[np.generic]]
"""A batch by input or output name, rows first."""


class Busy(Exception):
    """Another thread runs the module just now."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Served:
    """What is known of a proven version: its manifest, when it was ready, and how far it is from the one before."""

    manifest: Manifest
    loaded_at: datetime
    drift: float | None = None

    @property
    def version(self) -> int:
        """The number of the version."""
        return self.manifest.version

    @property
    def digest(self) -> str:
        """The digest of the weights."""
        return self.manifest.weights.digest

    @property
    def signature(self) -> Signature:
        """What a request must look like."""
        return self.manifest.signature

    @property
    def publish_to_served_s(self) -> float:
        """Seconds from the publisher's clock at the commit to this one's when the version was ready; 0 if that is ahead."""
        return self.manifest.age_s(self.loaded_at)


@dataclass(frozen=True, eq=False, kw_only=True)
class Servable(Served):
    """A module with verified weights, its probe, and the manifest that tells whose they are.

    Modules may keep things on `self` between two lines of `forward`, so only one thread at a time may run one. The
    servable sees to that: run its module through its methods alone.
    """

    module: nn.Module
    probe: Probe
    device: torch.device
    _turn: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @classmethod
    def proven(
        cls, manifest: Manifest, module: nn.Module, probe: Probe, device: torch.device, *, before: "Servable | None"
    ) -> "Servable":
        """Return a servable that has answered its probe as recorded. Raises `BadVersion` when the module does not.

        The drift is measured against the version `before` where that takes the same inputs.
        """
        outputs = proof.replay(manifest, probe, module, device=device)
        moved = None
        if before is not None and before.signature == manifest.signature:
            answers = before.answers_to(probe)
            moved = None if answers is None else drift(outputs, answers)
        return cls(
            manifest=manifest, loaded_at=datetime.now(UTC), drift=moved, module=module, probe=probe, device=device
        )

    @cached_property
    def _bound(self) -> Bound:
        return self.signature.bind(self.module)

    def run(self, inputs: Mapping[str, NDArray[np.generic]], *, wait: bool = True) -> Rows:
        """Return the outputs for a batch, by name. Raises whatever the module raises.

        Without `wait`, raises `Busy` when another thread runs the module.
        """
        if not self._turn.acquire(blocking=wait):
            raise Busy
        try:
            with torch.inference_mode():
                batch = {
                    field.name: torch.from_numpy(inputs[field.name]).to(self.device, field.torch_dtype)
                    for field in self.signature.inputs
                }
                outputs = self._bound(batch)
                return {name: _to_numpy(name, output) for name, output in outputs.items()}
        finally:
            self._turn.release()

    def prove(self) -> None:
        """Replay the version's own probe once more. Raises `BadVersion` when it does not answer as it was recorded."""
        with self._turn:
            proof.replay(self.manifest, self.probe, self.module, device=self.device)

    def answers_to(self, probe: Probe, *, wait_s: float = 1.0) -> dict[str, Tensor] | None:
        """Return the outputs for another version's probe, which must fit this one's signature.

        Where it asks the same as this version's own probe, nothing is run. `None` when the module cannot run it, or
        when requests keep it busy for `wait_s` seconds.
        """
        if _same(probe.inputs, self.probe.inputs):
            return self.probe.outputs
        if not self._turn.acquire(timeout=wait_s):
            return None
        try:
            outputs = probe.replay(self.module, self.signature)
            # Copies, because a module may write its next outputs over these.
            return {name: output.clone() for name, output in outputs.items()}
        except BadVersion:
            return None
        finally:
            self._turn.release()


def _same(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(
        tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]) for name, tensor in tensors.items()
    )


def _to_numpy(name: str, output: Tensor) -> NDArray[np.generic]:
    """Return a copy, because a module may write its next outputs over this one."""
    if output.dtype == torch.bfloat16:
        output = output.float()
    array: NDArray[np.generic] = output.numpy(force=True)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"output {name!r} is {array.dtype}, expected numbers or booleans")
    return array.copy()
