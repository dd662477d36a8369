"""Loading a version: fetch, verify, warm. Either a proven servable comes out, or a reason why not."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

import torch
from torch import Tensor

from emaswap import BadVersion, Manifest, Reason, Store
from emaswap.architecture import build, fill
from emaswap.probe import Probe, drift, tolerances
from emaswap.weights import Blob, dtype_name, not_finite
from service.lifecycle import State
from service.servable import Servable


class Loader:
    """Loads versions from one store, for one device, from trusted factories."""

    def __init__(self, store: Store, *, trusted: Sequence[str], device: torch.device) -> None:
        self.store = store
        self.trusted = tuple(trusted)
        self.device = device

    def load(
        self,
        manifest: Manifest,
        *,
        live: Servable | None,
        enter: Callable[[State], None],
        timings_s: dict[str, float],
    ) -> Servable:
        """A servable of this version, proven right.

        Args:
            manifest: of the version to load.
            live: the servable that is live now, to measure the drift against.
            enter: told of each stage as it begins.
            timings_s: receives the seconds that each stage took, also when one fails.

        Raises:
            BadVersion: the version is not what its manifest says, or does not answer its probe as it was recorded.
            StoreError: the store could not be read just now.
        """

        @contextmanager
        def stage(state: State) -> Iterator[None]:
            enter(state)
            began = time.perf_counter()
            try:
                yield
            finally:
                timings_s[str(state)] = round(time.perf_counter() - began, 6)

        with stage(State.FETCHING):
            weights = self.store.tensors("weights", Blob(manifest.weights.digest, manifest.weights.size)).tensors
            recorded = self.store.tensors("probes", Blob(manifest.probe.digest, manifest.probe.size)).tensors
        with stage(State.VERIFYING):
            if bad := not_finite(weights):
                raise BadVersion(Reason.NOT_FINITE, f"NaN or infinity in {', '.join(bad[:20])}")
            module = build(manifest.architecture, trusted=self.trusted)
            fill(module, weights)
            _check_table(manifest, weights)
            module.to(self.device)
        with stage(State.WARMING):
            probe = Probe.from_tensors(recorded)
            outputs = probe.replay(module, manifest.signature)
            rtol, atol = tolerances(weights, self.device)
            probe.compare(outputs, rtol=max(rtol, manifest.probe.rtol), atol=max(atol, manifest.probe.atol))
            moved = None
            if live is not None and live.signature == manifest.signature:
                moved = drift(outputs, probe.replay(live.module, live.signature))
        return Servable(manifest, module, self.device, datetime.now(UTC), moved)


def _check_table(manifest: Manifest, weights: Mapping[str, Tensor]) -> None:
    """The manifest's own table of tensors must be that of the file, or whoever reads it is misled."""
    table = {name: (info.dtype, info.shape) for name, info in manifest.weights.tensors.items()}
    found = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in weights.items()}
    if different := sorted(name for name in table.keys() | found.keys() if table.get(name) != found.get(name)):
        raise BadVersion(
            Reason.MANIFEST_INVALID, f"its table of tensors is not that of the file: {', '.join(different[:20])}"
        )
