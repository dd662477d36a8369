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
    return Servable(publish(), Linear(), Probe({}, {}), torch.device("cpu"), datetime.now(UTC))


def test_a_new_slot_is_empty() -> None:
    """Before the first version nothing is live."""
    assert Slot().current is None


def test_a_swap_makes_the_new_one_live_and_hands_back_the_old_one(publish: Publish) -> None:
    """Whoever swaps learns what was live before."""
    first, second = servable(publish), servable(publish)
    slot = Slot()
    assert slot.swap(first) is None
    assert slot.current is first
    assert slot.swap(second) is first
    assert slot.current is second


def test_a_slot_keeps_nothing_but_the_live_one(publish: Publish) -> None:
    """The old servable is freed as soon as nobody else uses it."""
    slot = Slot()
    slot.swap(servable(publish))
    gone = weakref.ref(slot.current)
    slot.swap(servable(publish))
    assert gone() is None


def test_what_is_withdrawn_is_live_no_more(publish: Publish) -> None:
    """A live servable can be withdrawn; one that has been replaced takes its successor nowhere."""
    first, second = servable(publish), servable(publish)
    slot = Slot()
    slot.swap(first)
    slot.swap(second)
    slot.withdraw(first)
    assert slot.current is second
    slot.withdraw(second)
    assert slot.current is None
