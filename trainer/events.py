"""Event files: scalars in the format that TensorBoard reads."""

import os
import socket
import struct
import time
from collections.abc import Mapping

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

# tensorboardX's own writer hands events to a thread. A full disk ends that thread, and a few events later the caller
# blocks forever. So this module uses only its formats, and the caller writes the bytes and sees every failure.


def file_name() -> str:
    """Return a file name that TensorBoard recognises and that sorts after earlier files, since it reads them in order."""
    return f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"


def start(step: int) -> bytes:
    """Return the records to write before the scalars of `step`. They hide those the folder already has from `step` on."""
    version = Event(wall_time=time.time(), file_version="brain.Event:2")
    session = Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START))
    return _record(version) + _record(session)


def scalars(step: int, wall_time: float, metrics: Mapping[str, float]) -> bytes:
    """Return the record of a step's scalars; `wall_time` is in seconds since the epoch."""
    event = Event(wall_time=wall_time, step=step)
    for name, value in metrics.items():
        event.summary.value.extend(scalar(name, value).value)
    return _record(event)


def _record(event: Event) -> bytes:
    """Frame an event as a TFRecord: length, checksum of the length, data, checksum of the data."""
    data: bytes = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join((length, _checksum(length), data, _checksum(data)))


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
