"""Loading a version: fetch, verify, warm. Either a proven version comes out, or a reason why not."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Generic

import torch

from emaswap import BadVersion, Manifest, Missing, Reason, Short, Store
from emaswap.files.recycled import Recycled
from emaswap.store.line import Line
from emaswap.store.look import Look
from emaswap.versions import proof
from service.control.lifecycle import State
from service.control.quarantine import Stamps
from service.control.shortage import is_shortage
from service.serving.servable import Servable
from service.serving.slot import Live

Stage = Callable[[State], AbstractContextManager[None]]
"""What a stage of loading runs in, so that it is told and timed."""


@dataclass(frozen=True)
class Candidate:
    """A version that is to be loaded, as the store has it now."""

    manifest: Manifest
    stamps: Stamps


class Loader(ABC, Generic[Live]):
    """Loads versions from one store and proves them right. All of it blocks."""

    def __init__(self, store: Store, *, variant: str | None = None) -> None:
        """Load this variant of each version, by default its main average."""
        self.store = store
        self._line = Line(store)
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
        live: Live | None,
        enter: Callable[[State], None],
        timings_s: dict[str, float],
    ) -> Live:
        """Return this version, proven right.

        Args:
            candidate: the version to load.
            look: the store it was found in. A pin there overrules the line of terms.
            live: what is live now, to measure the drift against.
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
        pinned = look.pin is not None and look.pin.names(manifest.identity)
        if not pinned:
            self.check_place(manifest, look)
        try:
            return self._prove(manifest, live, stage)
        except BadVersion as error:
            if is_shortage(error):
                raise Short(str(error)) from None
            if error.reason is Reason.FILE_MISSING and not pinned and self._was_pruned(manifest.version):
                raise Missing(f"version {manifest.version} was pruned while it was being read") from None
            raise

    def check_place(self, manifest: Manifest, look: Look) -> None:
        """Raise `BadVersion` when a version is not in the line of those in the store."""
        self._line.check(manifest, look)

    @abstractmethod
    def _prove(self, manifest: Manifest, live: Live | None, stage: Stage) -> Live:
        """Go through the stages of loading."""

    def _was_pruned(self, version: int) -> bool:
        """Return whether a version has gone, or is one of which the manifest alone is kept: the first of a term."""
        return not self.store.has(version) or self.store.newest() > version


class OwnLoader(Loader[Servable]):
    """Loads versions into this process, for one device, from trusted factories."""

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
        super().__init__(store, variant=variant)
        self._max_bytes = max_bytes
        self._memory = Recycled()
        self._trusted = tuple(trusted)
        self._device = device

    def _prove(self, manifest: Manifest, live: Servable | None, stage: Stage) -> Servable:
        with stage(State.FETCHING):
            manifest = manifest.of_variant(self._variant)
            fetched = self.store.fetch(manifest, max_bytes=self._max_bytes, into=self._memory)
        with stage(State.VERIFYING):
            module = proof.verify(manifest, fetched, trusted=self._trusted, device=self._device, adopt=True)
        with stage(State.WARMING):
            return Servable.proven(manifest, module, fetched.probe, self._device, before=live)
