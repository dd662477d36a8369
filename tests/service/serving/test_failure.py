"""What an exception says: in words, and whether memory ran out."""

import pytest
import torch

from emaswap import BadVersion, Reason
from service.refusal import MAX_DETAIL
from service.serving.failure import Failure, describe, out_of_memory
from tests.faulty_models import Unspeakable


def caused_by(cause: BaseException) -> BaseException:
    """An error that was raised from another one."""
    error = BadVersion(Reason.PROBE_FAILED, "the probe does not run")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        pytest.param(MemoryError("x"), True, id="Python's own"),
        pytest.param(torch.OutOfMemoryError("CUDA out of memory."), True, id="torch's own"),
        pytest.param(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True, id="torch's on the CPU"),
        pytest.param(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True, id="another device"),
        pytest.param(RuntimeError("std::bad_alloc"), True, id="C++"),
        pytest.param(OSError(12, "Cannot allocate memory"), True, id="the system's"),
        pytest.param(caused_by(MemoryError()), True, id="what another error was raised from"),
        pytest.param(ValueError("out of memory"), False, id="an error of another kind with such words"),
        pytest.param(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, id="a wrong shape"),
        pytest.param(OSError(2, "No such file"), False, id="another error of the system's"),
        pytest.param(Unspeakable(), False, id="an error without a text"),
        pytest.param(SystemExit(1), False, id="an exit"),
    ],
)  # fmt: skip
def test_memory_that_ran_out_is_known(error: BaseException, memory: bool) -> None:
    """Whatever library says it, and however deep, it is told from other failures."""
    assert out_of_memory(error) is memory
    assert Failure.of(error).memory is memory


def test_real_allocations_that_fail_are_known() -> None:
    """torch and Python raise what is looked for."""
    for allocate in (lambda: torch.empty(1 << 50), lambda: bytearray(1 << 60)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert out_of_memory(caught.value)


def test_causes_that_go_round_in_a_circle_come_to_an_end() -> None:
    """An exception may be its own cause."""
    error = ValueError()
    error.__cause__ = error
    assert not out_of_memory(error)


def test_a_failure_tells_type_text_and_place_shortly() -> None:
    """However long the text, the description is short; the place is the line that raised."""
    try:
        raise KeyError("x" * 10_000_000)
    except KeyError as error:
        failure = Failure.of(error)
    assert failure.text.startswith("KeyError: ")
    assert len(failure.text) <= MAX_DETAIL
    assert failure.place.startswith(__file__)
    assert describe(Unspeakable()) == "Unspeakable"
