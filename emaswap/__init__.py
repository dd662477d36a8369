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
from emaswap.manifest import Architecture, Manifest, Pin
from emaswap.publisher import Publisher
from emaswap.release import __version__
from emaswap.schedule import Constant, ExponentialRamp, Schedule
from emaswap.signature import Signature, TensorField
from emaswap.store import DirectoryStore, Store, open_store

__all__ = [
    "EMA",
    "Architecture",
    "BadVersion",
    "Constant",
    "DirectoryStore",
    "EmaError",
    "EmaswapError",
    "ExponentialRamp",
    "Fenced",
    "Manifest",
    "Missing",
    "ModelEMA",
    "NotAFile",
    "Pin",
    "PublishError",
    "Publisher",
    "ReadOnly",
    "Reason",
    "Schedule",
    "Signature",
    "Store",
    "StoreError",
    "TensorField",
    "TooLarge",
    "__version__",
    "open_store",
]
