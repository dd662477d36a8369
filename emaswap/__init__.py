"""emaswap: the EMA weights of a running training job, in front of users, safely and without a pause."""

from emaswap.ema import EMA, ModelEMA
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
    StoreError,
    TooLarge,
)
from emaswap.manifest import Architecture, EmaInfo, Manifest, Pin
from emaswap.publisher import Publisher
from emaswap.release import __version__
from emaswap.schedule import (
    Constant,
    CountRamp,
    ExponentialRamp,
    InverseGamma,
    PowerFunction,
    Scaled,
    Schedule,
    make_schedule,
)
from emaswap.signature import Signature, TensorField
from emaswap.store import DirectoryStore, Store, open_store
from emaswap.synthesis import Snapshot, snapshots_of, synthesize

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
    "Signature",
    "Snapshot",
    "Store",
    "StoreError",
    "TensorField",
    "TooLarge",
    "__version__",
    "make_schedule",
    "open_store",
    "snapshots_of",
    "synthesize",
]
