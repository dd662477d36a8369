"""Files that are wholly on disk before they have their name: large ones flow there while they are written."""

from pathlib import Path
from typing import BinaryIO

import pytest

from emaswap.files import durable

# Neither a whole number of pieces nor of pages.
DATA = bytes(range(256)) * (30 << 12) + b"end"


def write(file: BinaryIO) -> int:
    """Write the data in pieces of many sizes; how much it was."""
    begin, size = 0, 1
    while begin < len(DATA):
        file.write(DATA[begin : begin + size])
        begin, size = begin + size, min(3 * size, 5 << 20)
    return len(DATA)


def test_a_large_file_is_on_its_way_to_the_disk_before_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system is told of each part once, in order, and all but the last few megabytes are told of; it takes all."""
    start = durable._start_writing_out
    if start is None:
        pytest.skip("this system cannot be told to start writing")
    parts: list[tuple[int, int, int]] = []

    def observed(handle: int, begin: int, size: int, flags: int) -> None:
        parts.append((begin, size, start(handle, begin, size, flags)))

    monkeypatch.setattr(durable, "_start_writing_out", observed)
    with durable.written(tmp_path, write) as (path, written):
        assert written == len(DATA)
        assert path.read_bytes() == DATA
    reached = 0
    for begin, size, status in parts:
        assert (begin, status) == (reached, 0)
        reached += size
    assert len(DATA) - (8 << 20) < reached <= len(DATA)


def test_a_system_that_lacks_the_call_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is only about time: the file is whole without it."""
    monkeypatch.setattr(durable, "_start_writing_out", None)
    with durable.written(tmp_path, write) as (path, _):
        assert path.read_bytes() == DATA
    assert list(tmp_path.iterdir()) == []


def test_a_small_file_needs_no_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written at once is left to fsync."""
    calls: list[object] = []
    monkeypatch.setattr(durable, "_start_writing_out", lambda *call: calls.append(call))
    with durable.written(tmp_path, lambda file: file.write(b"small")) as (path, _):
        assert path.read_bytes() == b"small"
    assert calls == []
