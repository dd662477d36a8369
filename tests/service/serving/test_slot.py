"""The slot: which servable is live."""

import weakref
from datetime import UTC, datetime

import torch

from emaswap.versions.probe import Probe
from service.serving.servable import Servable
from service.serving.slot import Slot
from tests.conftest import Publish
from tests.models import Linear


def servable(publish: Publish) -> Servable:
    """A servable of a version that was really published."""
    return Servable(
        manifest=publish(),
        module=Linear(),
        probe=Probe({}, {}),
        device=torch.device("cpu"),
        loaded_at=datetime.now(UTC),
    )


def test_a_new_slot_is_empty() -> None:
    """Before the first version nothing is live."""
    assert Slot().current is None


def test_a_swap_makes_the_new_one_live_and_hands_back_the_old_one(publish: Publish) -> None:
    """Whoever swaps learns what was live before."""
    first, second = servable(publish), servable(publish)
    slot: Slot[Servable] = Slot()
    assert slot.swap(first) is None
    assert slot.current is first
    assert slot.swap(second) is first
    assert slot.current is second


def test_a_slot_keeps_nothing_but_the_live_one(publish: Publish) -> None:
    """The old servable is freed as soon as nobody else uses it."""
    slot: Slot[Servable] = Slot()
    slot.swap(servable(publish))
    gone = weakref.ref(slot.current)
    slot.swap(servable(publish))
    assert gone() is None


def test_what_is_withdrawn_is_live_no_more(publish: Publish) -> None:
    """A live servable can be withdrawn; one that has been replaced takes its successor nowhere."""
    first, second = servable(publish), servable(publish)
    slot: Slot[Servable] = Slot()
    slot.swap(first)
    slot.swap(second)
    slot.withdraw(first)
    assert slot.current is second
    slot.withdraw(second)
    assert slot.current is None


def test_a_guarded_one_that_is_withdrawn_gives_its_place_back(publish: Publish) -> None:
    """The one before is live again; it has none before it."""
    first, second = servable(publish), servable(publish)
    slot: Slot[Servable] = Slot()
    slot.swap(first)
    slot.swap(second, guarded=True)
    assert slot.previous is first
    slot.withdraw(second)
    assert [slot.current, slot.previous] == [first, None]
    slot.withdraw(first)
    assert [slot.current, slot.previous] == [None, None]


def test_a_guard_ends(publish: Publish) -> None:
    """The one before is freed once the live one is trusted, and not by the end of an earlier guard."""
    slot: Slot[Servable] = Slot()
    slot.swap(servable(publish))
    slot.swap(servable(publish), guarded=True)
    before = weakref.ref(slot.previous)
    assert slot.current is not None
    slot.trust(slot.current.version - 1)
    assert before() is not None
    slot.trust(slot.current.version)
    assert before() is None, slot.previous


def test_one_that_broke_takes_no_place_again(publish: Publish) -> None:
    """A version that is withdrawn while another is live does not come back when that one breaks, too."""
    first, second = servable(publish), servable(publish)
    slot: Slot[Servable] = Slot()
    slot.swap(first)
    slot.swap(second, guarded=True)
    slot.withdraw(first)
    assert [slot.current, slot.previous] == [second, None]
    slot.withdraw(second)
    assert slot.current is None
