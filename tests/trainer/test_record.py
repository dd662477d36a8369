"""The record of a run: lines, TensorBoard events and a picture, in good order whatever happens."""

import json
import logging
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog

from emaswap import EmaswapError
from tests.disk import fill, small_disk
from trainer.record import Recorder


def lines(folder: Path) -> list[dict[str, Any]]:
    """The records in `metrics.jsonl`, as a strict reader of JSON sees them."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]


def steps(folder: Path) -> list[int]:
    """The steps in `metrics.jsonl`."""
    return [line["step"] for line in lines(folder)]


def events(path: Path) -> Iterator[Any]:
    """The events of a file, each with its checksums verified, as TensorBoard reads them."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        record, data = data[: 16 + length], data[16 + length :]
        for part, checksum in ((record[:8], record[8:12]), (record[12:-4], record[-4:])):
            crc = crc32c(part)
            assert struct.unpack("<I", checksum)[0] == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
        yield Event.FromString(record[12:-4])


def event_files(folder: Path) -> list[Path]:
    """The files of events, in the order in which TensorBoard reads them."""
    return sorted(folder.glob("events.out.tfevents.*"))


def shown(folder: Path) -> dict[str, dict[int, float]]:
    """The scalars that TensorBoard shows: a session that starts at a step takes the place of what was there from it on."""
    scalars: dict[str, dict[int, float]] = {}
    for path in event_files(folder):
        for event in events(path):
            if event.session_log.status == SessionLog.START:
                for curve in scalars.values():
                    for step in [step for step in curve if step >= event.step]:
                        del curve[step]
            for value in event.summary.value:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return scalars


def accuracies(step: int) -> dict[str, float]:
    """Something to record that shows which step it is of."""
    return {"raw_accuracy": 0.5 + step / 1000, "ema_accuracy": 0.75 + step / 1000}


def test_each_write_is_a_line_and_scalars(tmp_path: Path) -> None:
    """What was written is in both files before the recorder is closed, each metric under its name."""
    before = time.time()
    recorder = Recorder(tmp_path / "a" / "log")
    recorder.write(10, {"train_loss": 2.5})
    recorder.write(20, {"train_loss": 0.5, "ema_accuracy": 0.25})
    first, second = lines(tmp_path / "a" / "log")
    assert before <= first.pop("wall_time") <= second.pop("wall_time") <= time.time()
    assert first == {"step": 10, "train_loss": 2.5}
    assert second == {"step": 20, "train_loss": 0.5, "ema_accuracy": 0.25}
    assert shown(tmp_path / "a" / "log") == {"train_loss": {10: 2.5, 20: 0.5}, "ema_accuracy": {20: 0.25}}
    (path,) = event_files(tmp_path / "a" / "log")
    assert next(events(path)).file_version == "brain.Event:2"


def test_without_a_folder_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorder without a folder takes everything and leaves no file."""
    monkeypatch.chdir(tmp_path)
    with Recorder(None) as recorder:
        recorder.write(1, accuracies(1))
    assert list(tmp_path.iterdir()) == []


def test_a_recorder_that_writes_nothing_makes_nothing(tmp_path: Path) -> None:
    """A run that ends before its first record leaves no folder, and the record of an earlier run as it is."""
    with Recorder(tmp_path / "new", step=0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_is_still_json(tmp_path: Path) -> None:
    """NaN and infinity are null in a line, and themselves in an event; a picture leaves a gap."""
    with Recorder(tmp_path) as recorder:
        recorder.write(1, {"raw_accuracy": math.nan, "ema_accuracy": 0.5, "train_loss": math.inf})
        recorder.write(2, accuracies(2))
    assert [lines(tmp_path)[0][name] for name in ("raw_accuracy", "ema_accuracy", "train_loss")] == [None, 0.5, None]
    assert math.isnan(shown(tmp_path)["raw_accuracy"][1])
    assert shown(tmp_path)["train_loss"][1] == math.inf
    assert (tmp_path / "accuracy.png").exists()


@pytest.mark.parametrize(
    ("step", "first", "left"),
    [
        (20, 25, [10, 20, 25]),
        (20, 40, [10, 20, 40]),
        (20, 20, [10, 20]),
        (0, 10, [10]),
        (30, 40, [10, 20, 30, 40]),
        (None, 30, [10, 20, 30]),
        (None, 31, [10, 20, 30, 31]),
    ],
    ids=[
        "between two records",
        "after the later record",
        "the same step once more",
        "from the beginning",
        "where it ended",
        "step not given, the last one once more",
        "step not given, a later one",
    ],
)
def test_a_resumed_run_supersedes_later_records(tmp_path: Path, step: int | None, first: int, left: list[int]) -> None:
    """What was recorded after the step that a run goes on from is gone, from the lines and from what TensorBoard shows."""
    with Recorder(tmp_path, step=0) as recorder:
        for recorded in (10, 20, 30):
            recorder.write(recorded, {"train_loss": -1.0})
    with Recorder(tmp_path, step=step) as recorder:
        recorder.write(first, {"train_loss": 1.0})
    assert steps(tmp_path) == left
    assert lines(tmp_path)[-1]["train_loss"] == 1.0
    assert len(event_files(tmp_path)) == 2
    assert shown(tmp_path)["train_loss"] == {it: 1.0 if it == first else -1.0 for it in left}


def test_a_step_back_supersedes_within_a_run(tmp_path: Path) -> None:
    """A step that is recorded twice is there once, as it was recorded last."""
    recorder = Recorder(tmp_path)
    for value, step in enumerate((1, 2, 3, 2)):
        recorder.write(step, {"train_loss": float(value)})
    assert [(line["step"], line["train_loss"]) for line in lines(tmp_path)] == [(1, 0.0), (2, 3.0)]
    assert shown(tmp_path)["train_loss"] == {1: 0.0, 2: 3.0}


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    """A line that a killed run has left half-written does not spoil the next one."""
    Recorder(tmp_path).write(1, accuracies(1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "raw_acc')
    Recorder(tmp_path, step=1).write(2, accuracies(2))
    assert steps(tmp_path) == [1, 2]


def test_a_line_of_somebody_else_stays(tmp_path: Path) -> None:
    """A line that is no record is left alone, and does not keep the picture from being drawn."""
    (tmp_path / "metrics.jsonl").write_text("# a note\n[1]\n")
    with Recorder(tmp_path) as recorder:
        recorder.write(1, accuracies(1))
    assert (tmp_path / "metrics.jsonl").read_text().startswith('# a note\n[1]\n{"step": 1,')
    assert (tmp_path / "accuracy.png").exists()


def test_a_full_disk_is_an_error_and_the_record_goes_on(tmp_path: Path) -> None:
    """Each write to a full disk raises; when there is room again, lines and events are whole."""
    with small_disk(tmp_path / "disk", "256k") as disk:
        recorder = Recorder(disk)
        many = {f"metric_{index}": float(index) for index in range(500)}
        recorder.write(1, {"train_loss": 1.0})
        filler = fill(disk)
        for step in (2, 3):
            with pytest.raises(EmaswapError, match=rf"cannot record step {step} in .*: No space left on device"):
                recorder.write(step, many)
        filler.unlink()
        recorder.write(4, many | {"train_loss": 4.0})
        assert steps(disk) == [1, 4]
        assert len(event_files(disk)) == 1
        assert shown(disk)["train_loss"] == {1: 1.0, 4: 4.0}
        recorder.close()


def test_a_disk_that_is_full_from_the_beginning(tmp_path: Path) -> None:
    """The first record that succeeds makes whole files, and what failed before it has left no others."""
    with small_disk(tmp_path / "disk", "256k") as disk:
        filler = fill(disk)
        recorder = Recorder(disk)
        for step in range(1, 4):
            with pytest.raises(EmaswapError, match="No space left on device"):
                recorder.write(step, accuracies(step))
        filler.unlink()
        recorder.write(4, accuracies(4))
        assert steps(disk) == [4]
        assert len(event_files(disk)) == 1
        assert shown(disk)["raw_accuracy"].keys() == {4}


def test_a_folder_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    """A file where the folder should be is named in the error."""
    (tmp_path / "log").write_text("")
    with pytest.raises(EmaswapError, match=r"cannot record step 1 in .*log: "):
        Recorder(tmp_path / "log").write(1, accuracies(1))


def test_the_picture_has_both_curves(tmp_path: Path) -> None:
    """The curves of the whole file are in the picture, those of the earlier run, too."""
    blue, orange = (31, 119, 180), (255, 127, 14)
    with Recorder(tmp_path, step=0) as recorder:
        for step in range(1, 11):
            recorder.write(step, accuracies(step) if step != 5 else {"train_loss": 1.0})
    assert len(_columns(tmp_path / "accuracy.png", blue)) > 300
    assert len(_columns(tmp_path / "accuracy.png", orange)) > 300
    with Recorder(tmp_path, step=10) as recorder:
        recorder.write(11, accuracies(11))
    # One point alone would be a dot.
    assert len(_columns(tmp_path / "accuracy.png", blue)) > 300
    assert not list(tmp_path.glob("*.part"))


def test_without_accuracies_there_is_no_picture(tmp_path: Path) -> None:
    """A task that measures something else is recorded all the same."""
    with Recorder(tmp_path) as recorder:
        recorder.write(1, {"ema_loss": 1.0})
    assert steps(tmp_path) == [1]
    assert not (tmp_path / "accuracy.png").exists()


def test_a_picture_that_cannot_be_written_fails_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`close` raises; leaving the block logs a warning, and how the block ended is not hidden."""
    (tmp_path / "accuracy.png" / "in the way").mkdir(parents=True)
    recorder = Recorder(tmp_path)
    recorder.write(1, accuracies(1))
    with pytest.raises(EmaswapError, match=r"cannot draw the record in .*: Is a directory"):
        recorder.close()
    recorder.close()  # what is closed stays closed

    def interrupted() -> None:
        with Recorder(tmp_path) as recorder:
            recorder.write(2, accuracies(2))
            raise ZeroDivisionError

    with caplog.at_level(logging.WARNING), pytest.raises(ZeroDivisionError):
        interrupted()
    assert "cannot draw the record in" in caplog.text


def test_what_cannot_be_drawn_fails_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line with words for figures keeps the picture from being drawn, and that is only a warning."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "raw_accuracy": [], "ema_accuracy": {"a": 1}}\n')
    recorder = Recorder(tmp_path, step=1)
    recorder.write(2, accuracies(2))
    recorder.close()
    assert "cannot draw the record in" in caplog.text


def _columns(path: Path, color: tuple[int, int, int]) -> set[int]:
    """The columns of a picture with a pixel of this colour."""
    pixels = (imread(path)[:, :, :3] * 255).round().astype(int)
    return set((abs(pixels - color).max(2) <= 2).any(0).nonzero()[0].tolist())
