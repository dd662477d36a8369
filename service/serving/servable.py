"""A servable: one proven version, ready to answer. It never changes; going live is a reference to it being assigned."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from emaswap import Manifest, Signature
from emaswap.versions.signature import Bound

Rows = dict[str, NDArray[np.generic]]
"""A batch by input or output name, rows first."""


@dataclass(frozen=True, eq=False)
class Servable:
    """A module with verified weights, and the manifest that tells whose they are."""

    manifest: Manifest
    module: nn.Module
    device: torch.device
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
        """Seconds from the publisher's clock at the commit to this one's when the version was ready."""
        return (self.loaded_at - self.manifest.created_at).total_seconds()

    @cached_property
    def _bound(self) -> Bound:
        return self.signature.bind(self.module)

    def run(self, inputs: Mapping[str, NDArray[np.generic]]) -> Rows:
        """The outputs for a batch, by name. Raises whatever the module raises."""
        with torch.inference_mode():
            batch = {
                field.name: torch.from_numpy(inputs[field.name]).to(self.device, field.torch_dtype)
                for field in self.signature.inputs
            }
            outputs = self._bound(batch)
            return {name: _to_numpy(output) for name, output in outputs.items()}


def _to_numpy(output: torch.Tensor) -> NDArray[np.generic]:
    if output.dtype == torch.bfloat16:
        output = output.float()
    array: NDArray[np.generic] = output.cpu().numpy()
    return np.ascontiguousarray(array)
