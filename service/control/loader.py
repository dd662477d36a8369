"""Loading a version: fetch, verify, warm. Either a proven servable comes out, or a reason why not."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

import torch

from emaswap import Manifest, Store
from emaswap.versions import proof
from emaswap.versions.probe import drift
from service.control.lifecycle import State
from service.serving.servable import Servable


class Loader:
    """Loads versions from one store, for one device, from trusted factories."""

    def __init__(
        self, store: Store, *, trusted: Sequence[str], device: torch.device, variant: str | None = None
    ) -> None:
        self.store = store
        self.variant = variant
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
            manifest = manifest.of_variant(self.variant)
            fetched = self.store.fetch(manifest)
        with stage(State.VERIFYING):
            module = proof.verify(manifest, fetched, trusted=self.trusted, device=self.device)
        with stage(State.WARMING):
            outputs = proof.replay(manifest, fetched.probe, module, device=self.device)
            moved = None
            if live is not None and live.signature == manifest.signature:
                before = live.answers_to(fetched.probe)
                moved = None if before is None else drift(outputs, before)
        return Servable(manifest, module, fetched.probe, self.device, datetime.now(UTC), moved)
