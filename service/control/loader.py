"""Loading a version: fetch, verify, warm. Either a proven servable comes out, or a reason why not."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from emaswap import BadVersion, Manifest, Missing, Reason, Short, Store
from emaswap.store.line import Line
from emaswap.store.look import Look
from emaswap.versions import proof
from emaswap.versions.probe import drift
from service.control.lifecycle import State
from service.control.quarantine import Stamps
from service.control.shortage import is_shortage
from service.serving.servable import Servable


@dataclass(frozen=True)
class Candidate:
    """A version that is to be loaded, as the store has it now."""

    manifest: Manifest
    stamps: Stamps


class Loader:
    """Loads versions from one store, for one device, from trusted factories. All of it blocks."""

    def __init__(
        self,
        store: Store,
        *,
        trusted: Sequence[str],
        device: torch.device,
        variant: str | None = None,
        max_bytes: int | None = None,
    ) -> None:
        """Load weights files of at most `max_bytes`, of any size by default."""
        self.store = store
        self._max_bytes = max_bytes
        self._line = Line(store)
        self._trusted = tuple(trusted)
        self._device = device
        self._variant = variant

    def read(self, version: int) -> Candidate:
        """Read a version's manifest.

        Raises:
            BadVersion: it cannot be right.
            StoreError: it is gone, or cannot be read just now.
        """
        # The stamps come first: what changes while it is being loaded deserves another try.
        stamps = self.store.stamps(version)
        return Candidate(self.store.manifest(version), stamps)

    def load(
        self,
        candidate: Candidate,
        look: Look,
        *,
        live: Servable | None,
        enter: Callable[[State], None],
        timings_s: dict[str, float],
    ) -> Servable:
        """Return a servable of this version, proven right.

        Args:
            candidate: the version to load.
            look: the store it was found in. A pin there overrules the line of terms.
            live: the servable that is live now, to measure the drift against.
            enter: told of each stage as it begins.
            timings_s: receives the seconds that each stage took, also when one fails.

        Raises:
            BadVersion: the version is not what its manifest says, or does not answer its probe as it was recorded.
            StoreError: the store could not be read just now, or memory, handles or the like were short.
        """

        @contextmanager
        def stage(state: State) -> Iterator[None]:
            enter(state)
            began = time.perf_counter()
            try:
                yield
            finally:
                timings_s[str(state)] = round(time.perf_counter() - began, 6)

        manifest = candidate.manifest
        if look.pin is None or not look.pin.names(manifest.identity):
            self._line.check(manifest, look)
        try:
            with stage(State.FETCHING):
                manifest = manifest.of_variant(self._variant)
                fetched = self.store.fetch(manifest, max_bytes=self._max_bytes)
            with stage(State.VERIFYING):
                module = proof.verify(manifest, fetched, trusted=self._trusted, device=self._device)
            with stage(State.WARMING):
                outputs = proof.replay(manifest, fetched.probe, module, device=self._device)
                moved = None
                if live is not None and live.signature == manifest.signature:
                    before = live.answers_to(fetched.probe)
                    moved = None if before is None else drift(outputs, before)
        except BadVersion as error:
            if is_shortage(error):
                raise Short(str(error)) from None
            if error.reason is Reason.FILE_MISSING and self._was_pruned(manifest.version):
                raise Missing(f"version {manifest.version} was pruned while it was being read") from None
            raise
        return Servable(manifest, module, fetched.probe, self._device, datetime.now(UTC), moved)

    def _was_pruned(self, version: int) -> bool:
        """Return whether a version has gone, or is one of which the manifest alone is kept: the first of a term."""
        return not self.store.has(version) or self.store.newest() > version
