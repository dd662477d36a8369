"""The manifest: the frozen, validated description of one version.

Knows what a version says of itself; whether that is true is for the reader of its weights to prove.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from emaswap.errors import BadVersion, Reason
from emaswap.files.digest import Digest, digest_of
from emaswap.files.tensor_file import Blob, Size
from emaswap.release import __version__
from emaswap.versions.architecture import Architecture
from emaswap.versions.signature import MAX_DIMENSIONS, MAX_NUMBERS, Signature

FORMAT = 1
MAX_MANIFEST_BYTES = 4 << 20
MAX_NAME = 200
# Of a manifest that is wrong in many places, so many are shown, cut to so many characters.
_SHOWN, _MAX_PLACE, _MAX_PROBLEM = 5, 200, 150

Version = Annotated[int, Field(ge=1, le=10**15)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Name = Annotated[str, Field(max_length=MAX_NAME)]
VariantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


Metric = Annotated[float | None, AfterValidator(_finite_or_none)]


class _Frozen(BaseModel):
    # Fields that a later release adds are no reason to refuse a version.
    model_config = ConfigDict(frozen=True, extra="ignore")


class TensorInfo(_Frozen):
    """dtype ("float32") and shape of one tensor of the weights."""

    dtype: Annotated[str, Field(max_length=32)]
    shape: Annotated[tuple[Size, ...], Field(max_length=MAX_DIMENSIONS)]

    @field_validator("shape")
    @classmethod
    def _can_be_counted(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if math.prod(max(size, 1) for size in shape) > MAX_NUMBERS:
            raise ValueError(f"a tensor has at most {MAX_NUMBERS} numbers, got the shape {shape}")
        return shape


class WeightsInfo(Blob):
    """The weights file, and the tensors in it, tied ones once."""

    tensors: dict[str, TensorInfo]


class ScheduleInfo(_Frozen):
    """The schedule of an average's decay: its name, and its parameters under their own names."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: Annotated[str, Field(min_length=1, max_length=200)]


class EmaInfo(_Frozen):
    """How the average came about; without a schedule the weights are no average. `window` is 1/(1 − the last decay)."""

    schedule: ScheduleInfo | None = None
    updates: Count = 0
    update_every: Annotated[int, Field(ge=1)] = 1
    window: Metric = None
    dtype: str = "float32"


class TrainingInfo(_Frozen):
    """Where training stood: optimizer steps, and metrics. A metric that is not finite is kept as null."""

    step: Count = 0
    metrics: dict[str, Metric] = {}


class ProbeInfo(Blob):
    """The probe file, and how far |served − recorded| may go: at most atol + rtol·|recorded|.

    A reader has tolerances of its own. What stands here can tighten them, and never loosen them.
    """

    rtol: Annotated[float, Field(ge=0, le=1)]
    atol: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Variant(_Frozen):
    """Another average of the same model at the same step: its weights, how it came about, its probe."""

    weights: WeightsInfo
    ema: EmaInfo
    probe: ProbeInfo


@dataclass(frozen=True)
class Identity:
    """What a version is: its number and its manifest's digest, since a store begun anew has other versions 1, 2, 3."""

    version: int
    digest: Digest

    def __str__(self) -> str:
        return f"version {self.version} ({self.digest[:19]})"


class Manifest(_Frozen):
    """One version. `term` and `run` name its publisher's turn at the store, `parent` is the manifest before it."""

    format: Annotated[int, Field(ge=1, le=FORMAT)] = FORMAT
    release: Name = __version__
    model: Annotated[Name, Field(min_length=1)]
    version: Version
    term: Annotated[int, Field(ge=1, le=10**15)]
    run: Name
    parent: Digest | None = None
    created_at: AwareDatetime
    weights: WeightsInfo
    architecture: Architecture
    signature: Signature
    ema: EmaInfo = EmaInfo()
    training: TrainingInfo = TrainingInfo()
    probe: ProbeInfo
    variants: dict[VariantName, Variant] = {}

    @cached_property
    def identity(self) -> Identity:
        """The version's identity, by the bytes that this manifest was read from, or else those it would be stored as."""
        return Identity(self.version, digest_of(self.encode()))

    def files(self) -> Iterator[tuple[Literal["weights", "probes"], Blob]]:
        """Yield every file of the version with its kind: weights and probe of its own, and of all its variants."""
        parts: tuple[Manifest | Variant, ...] = (self, *self.variants.values())
        for part in parts:
            yield "weights", part.weights
            yield "probes", part.probe

    def age_s(self, now: datetime) -> float:
        """Return the seconds since it was published, by the two clocks; 0 when they say that it lies in the future."""
        return max(0.0, (now - self.created_at).total_seconds())

    def skew_s(self, now: datetime) -> float:
        """Return by how many seconds the publisher's clock is ahead of this one at least; 0 when nothing shows it."""
        return max(0.0, (self.created_at - now).total_seconds())

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some fields changed. It is another version, and knows its own identity."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("identity", None)
        return copied

    def of_variant(self, name: str | None) -> "Manifest":
        """Return this version with the weights of the named variant, or as it is for `None`; its identity stays.

        Raises `BadVersion` when it has no such variant.
        """
        if name is None:
            return self
        variant = self.variants.get(name)
        if variant is None:
            there = ", ".join(self.variants) or "none"
            raise BadVersion(Reason.VARIANT_MISSING, f"it has no variant {name!r}; its variants: {there}")
        return self.model_copy(update=dict(variant) | {"variants": {}})._of(self.identity)

    def encode(self) -> bytes:
        """Return the bytes to store: JSON that people can read, too."""
        return self.model_dump_json(indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> "Manifest":
        """Read stored bytes. Raises `BadVersion` when they are no manifest, or one of a later format."""
        _check_format(data)
        try:
            manifest = cls.model_validate_json(data, strict=True)
        except ValidationError as error:
            raise BadVersion(Reason.MANIFEST_INVALID, in_a_line(error)) from None
        return manifest._of(Identity(manifest.version, digest_of(data)))

    def _of(self, identity: Identity) -> Self:
        self.__dict__["identity"] = identity
        return self


def _check_format(data: bytes) -> None:
    """Raise `BadVersion` unless these bytes are one JSON object, no name in it twice, of a format that can be read."""
    try:
        raw = json.loads(data.decode(), object_pairs_hook=_each_name_once)
    except (ValueError, RecursionError) as error:
        raise BadVersion(Reason.MANIFEST_INVALID, f"not JSON of a manifest: {error}") from None
    if not isinstance(raw, dict):
        raise BadVersion(Reason.MANIFEST_INVALID, f"expected a JSON object, got a {type(raw).__name__}")
    found, release = raw.get("format"), str(raw.get("release", "(unknown)"))[:MAX_NAME]
    if isinstance(found, int) and found > FORMAT:
        raise BadVersion(
            Reason.FORMAT_UNKNOWN,
            f"written in format {str(found)[:MAX_NAME]} by emaswap {release}; this is emaswap {__version__}, which "
            f"reads up to format {FORMAT}: upgrade to the release that wrote it, or a later one",
        )


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs. Programs differ in which of two values of one name they read."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {twice[:MAX_NAME]!a} stands twice in one object")
    return found


def in_a_line(error: ValidationError) -> str:
    """Return what is wrong with stored JSON, shortened: in which place, and what was expected there."""
    problems = [
        f"{'.'.join(map(str, each['loc']))[:_MAX_PLACE] or 'the whole'}: {each['msg'][:_MAX_PROBLEM]}"
        for each in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    more = f"; and {len(problems) - _SHOWN} more" if problems[_SHOWN:] else ""
    return "; ".join(problems[:_SHOWN]) + more


MAX_REASON = 1000
"""The most characters that an order's reason has."""


class Pin(_Frozen):
    """An operator's order: this version is the one to serve, whatever is newer.

    `digest` is that of the version's manifest when it was pinned, where that was known.
    """

    version: Version
    digest: Digest | None = None
    reason: Annotated[str, Field(max_length=MAX_REASON)] = ""
    at: datetime

    def names(self, identity: Identity) -> bool:
        """Return whether this is the version that was pinned, and not another that has its number by now."""
        return self.version == identity.version and self.digest in (None, identity.digest)
