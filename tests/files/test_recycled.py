"""Memory that is used again, and only when nothing looks at it any more."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from emaswap import Short
from emaswap.files.recycled import Recycled


def _address(array: NDArray[np.uint8]) -> int:
    return int(array.ctypes.data)


def test_what_nothing_looks_at_is_used_again() -> None:
    """The next file of about this size gets the same pages, with what is in them."""
    memory = Recycled()
    first = memory(1 << 20)
    first[:] = 7
    address = _address(first)
    del first
    second = memory((1 << 20) - 1)
    assert _address(second) == address
    assert len(second) == (1 << 20) - 1


@pytest.mark.parametrize(
    "view",
    [
        lambda array: torch.from_numpy(array[64:]).view(torch.float32).numpy(),
        lambda array: torch.from_numpy(array).view(torch.int32)[3:5].view(1, 2).numpy(),
        lambda array: array[5:6],
    ],
    ids=["tensor", "slice of a tensor", "array"],
)
def test_what_something_looks_at_stays_as_it_is(view: Callable[[NDArray[np.uint8]], NDArray[Any]]) -> None:
    """A view, however far it is from where it came, keeps its memory to itself."""
    memory = Recycled()
    first = memory(1 << 20)
    first[:] = 7
    kept, address = view(first), _address(first)
    before = kept.copy()
    del first
    gc.collect()
    second = memory(1 << 20)
    assert _address(second) != address
    second[:] = 9
    assert np.array_equal(kept, before)
    del kept
    gc.collect()
    assert _address(memory(1 << 20)) == address


def test_what_is_too_small_or_far_too_large_is_let_go() -> None:
    """Memory is not kept for files that would waste more than half of it."""
    memory = Recycled()
    for first, second in ((1 << 16, 1 << 20), (1 << 22, 1 << 20)):
        memory(first)
        assert len(memory(second)) == second


def test_more_than_there_is_is_short() -> None:
    """A size that no machine has is told before anything is allocated."""
    with pytest.raises(Short):
        Recycled()(1 << 60)
