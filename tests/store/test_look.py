"""One look at a store, while others publish and pin."""

from collections.abc import Callable
from pathlib import Path

from emaswap import DirectoryStore, Store
from emaswap.store.directory import Directory
from emaswap.store.files import Entry
from emaswap.store.line import Term
from tests.forging import commit


class Busy(Directory):
    """A directory in which something happens just before it is listed, or just after."""

    def __init__(self, root: Path, *, before: Callable[[], object] = int, after: Callable[[], object] = int) -> None:
        super().__init__(root)
        self._before = before
        self._after = after

    def entries(self, folder: str) -> dict[str, Entry]:
        self._before()
        found = super().entries(folder)
        self._after()
        return found


def test_an_order_holds_for_every_version_committed_after_it(store: DirectoryStore) -> None:
    """A look that shows a version shows the pin that was given before that version was committed."""
    term = Term(store, "test")
    commit(store, term)

    def pin_and_commit() -> None:
        store.orders.set_pin(1)
        commit(store, term)

    look = Store(Busy(store.root, before=pin_and_commit)).look()
    assert look.numbers == (1, 2)
    assert look.pin is not None
    assert look.pin.version == 1


def test_what_was_pinned_since_the_listing_is_in_the_look(store: DirectoryStore) -> None:
    """A version that is committed and pinned between the two readings is not taken for one that is not there."""
    term = Term(store, "test")
    commit(store, term)

    def commit_and_pin() -> None:
        commit(store, term)
        store.orders.set_pin(2)

    look = Store(Busy(store.root, after=commit_and_pin)).look()
    assert look.pin is not None
    assert look.numbers == (1, 2)


def test_a_pin_on_what_is_not_there_adds_nothing(store: DirectoryStore) -> None:
    """The look has what was listed, and the order."""
    term = Term(store, "test")
    commit(store, term)
    commit(store, term)
    store.orders.set_pin(2)
    (store.root / "versions" / "00000002.json").unlink()
    look = store.look()
    assert look.pin is not None
    assert look.numbers == (1,)
