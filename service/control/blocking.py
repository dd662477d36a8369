"""What blocks, off the event loop: looks at the store, and loads. Each kind has a lane, and can be given up when it hangs."""

from collections.abc import Callable, Collection
from typing import Generic

from emaswap import Identity
from emaswap.store.look import Look
from service.control.lane import Lane
from service.control.lifecycle import State
from service.control.loader import Candidate, Loader
from service.control.survey import Survey, survey
from service.serving.slot import Live

_LOOK_TIMEOUT_S = 60.0


class Blocking(Generic[Live]):
    """Runs a loader. Every method may raise what the loader raises, and `Hung` or `Blocked`."""

    def __init__(self, loader: Loader[Live], *, load_timeout_s: float) -> None:
        """Give a load up after `load_timeout_s` seconds."""
        self._loader = loader
        self._load_timeout_s = load_timeout_s
        self._looking = Lane("emaswap-look")
        self._loading = Lane("emaswap-load")

    @property
    def hung_loads(self) -> int:
        """How many loads were given up and still hang."""
        return self._loading.hung

    async def survey(
        self, live: Identity | None, stamp: str | None, rejected: Collection[int], to_check: Collection[int]
    ) -> Survey:
        """Look at the store, as `survey` does."""
        return await self._looking.run(
            lambda: survey(self._loader.store, live, stamp, rejected, to_check), _LOOK_TIMEOUT_S
        )

    async def check_place(self, identity: Identity, look: Look) -> None:
        """Raise `BadVersion` when a version is not in the line of those in the store."""

        def check() -> None:
            manifest = self._loader.read(identity.version).manifest
            if manifest.identity == identity:
                self._loader.check_place(manifest, look)

        await self._looking.run(check, _LOOK_TIMEOUT_S)

    async def read(self, version: int) -> Candidate:
        """Read a version's manifest."""
        return await self._loading.run(lambda: self._loader.read(version), self._load_timeout_s)

    async def load(
        self,
        candidate: Candidate,
        look: Look,
        *,
        live: Live | None,
        enter: Callable[[State], None],
        timings_s: dict[str, float],
    ) -> Live:
        """Load a version, as `Loader.load` does; `enter` is called on another thread."""
        return await self._loading.run(
            lambda: self._loader.load(candidate, look, live=live, enter=enter, timings_s=timings_s),
            self._load_timeout_s,
        )

    def close(self) -> None:
        """Let the threads end; do not wait for work that is under way."""
        self._looking.close()
        self._loading.close()
