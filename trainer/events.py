"""A file of scalars that TensorBoard shows."""

import os
import socket
import struct
import time
from collections.abc import Mapping

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

# tensorboardX' own writer hands events to a thread, and a full disk ends that thread: after a few events more, the next
# one would wait for ever. So its formats are used here, and the writing is done by whoever wants to know of a failure.


def file_name() -> str:
    """A name that TensorBoard looks for, and that comes after those of earlier files: it reads them in that order."""
    return f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"


def start(step: int) -> bytes:
    """What comes before the scalars of `step` and later steps. Those that the folder already has are no longer shown."""
    version = Event(wall_time=time.time(), file_version="brain.Event:2")
    session = Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START))
    return _record(version) + _record(session)


def scalars(step: int, wall_time: float, metrics: Mapping[str, float]) -> bytes:
    """The scalars of a step; `wall_time` in seconds since the epoch."""
    event = Event(wall_time=wall_time, step=step)
    for name, value in metrics.items():
        event.summary.value.extend(scalar(name, value).value)
    return _record(event)


def _record(event: Event) -> bytes:
    """An event framed as TFRecord: length, its checksum, data, its checksum."""
    data: bytes = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join((length, _checksum(length), data, _checksum(data)))


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
