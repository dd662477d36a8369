"""emaswap: the EMA weights of a running training job, in front of users, safely and without a pause."""

from emaswap.averaging.ema import EMA
from emaswap.averaging.model_ema import ModelEMA
from emaswap.averaging.recalibration import recalibrate
from emaswap.averaging.schedule import (
    Constant,
    CountRamp,
    ExponentialRamp,
    InverseGamma,
    PowerFunction,
    Scaled,
    Schedule,
    make_schedule,
    window,
)
from emaswap.averaging.synthesis import Snapshot, synthesize
from emaswap.errors import (
    BadVersion,
    EmaError,
    EmaswapError,
    Fenced,
    Missing,
    NotAFile,
    PublishError,
    ReadOnly,
    Reason,
    Short,
    StoreError,
    TooLarge,
    Unreadable,
)
from emaswap.publishing.loading import load
from emaswap.publishing.published import snapshots_of
from emaswap.publishing.publisher import Publisher
from emaswap.release import __version__
from emaswap.store import DirectoryStore, Store, open_store
from emaswap.versions.architecture import Architecture
from emaswap.versions.manifest import EmaInfo, Identity, Manifest, Pin, ScheduleInfo
from emaswap.versions.signature import Signature, TensorField

__all__ = [
    "EMA",
    "Architecture",
    "BadVersion",
    "Constant",
    "CountRamp",
    "DirectoryStore",
    "EmaError",
    "EmaInfo",
    "EmaswapError",
    "ExponentialRamp",
    "Fenced",
    "Identity",
    "InverseGamma",
    "Manifest",
    "Missing",
    "ModelEMA",
    "NotAFile",
    "Pin",
    "PowerFunction",
    "PublishError",
    "Publisher",
    "ReadOnly",
    "Reason",
    "Scaled",
    "Schedule",
    "ScheduleInfo",
    "Short",
    "Signature",
    "Snapshot",
    "Store",
    "StoreError",
    "TensorField",
    "TooLarge",
    "Unreadable",
    "__version__",
    "load",
    "make_schedule",
    "open_store",
    "recalibrate",
    "snapshots_of",
    "synthesize",
    "window",
]
