"""What goes over HTTP as JSON. Small requests are validated by these schemas, and all of them are documented."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from emaswap import Pin, Reason, Signature
from emaswap.versions.architecture import Architecture
from emaswap.versions.manifest import MAX_REASON, EmaInfo, TrainingInfo
from service.control.lifecycle import Record, State
from service.control.standing import Standing
from service.serving.servable import Served


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True)


class PredictRequest(_Schema):
    """Rows first; a mapping from name to rows where the model has several inputs."""

    inputs: list[Any] | dict[str, list[Any]] = Field(examples=[[[0.0, 1.0]]])


class ModelIdentity(_Schema):
    """Which version made an answer. `digest` is that of its weights."""

    name: str
    version: int
    step: int
    digest: str


class Prediction(_Schema):
    """The likeliest label of a row and its softmax probability."""

    label: str
    score: float | None


class PredictResponse(_Schema):
    """Outputs in the order of the rows; by name where the model has several. A value that is not finite is null."""

    outputs: list[Any] | dict[str, list[Any]]
    predictions: list[Prediction] | None = Field(None, description="Only where the signature has labels.")
    model: ModelIdentity


class Problem(_Schema):
    """A refusal: a short code, and what was expected, what came, what to do."""

    error: str
    detail: str


class LiveVersion(_Schema):
    """Everything known about the live version."""

    name: str
    version: int
    step: int
    digest: str = Field(description="Of the weights.")
    manifest_digest: str = Field(description="Of the manifest: with the number, it tells this version from any other.")
    in_store: bool | None = Field(description="False when the store no longer has it, or another has its number.")
    term: int
    run: str
    published_at: datetime
    loaded_at: datetime
    age_s: float = Field(description="Seconds since it was published; never negative.")
    publish_to_served_s: float = Field(description="From its commit to it being live; never negative.")
    drift: float | None = Field(description="Mean |difference| of its probe answers from its predecessor's.")
    size_bytes: int
    architecture: Architecture
    signature: Signature
    ema: EmaInfo
    training: TrainingInfo
    pin: Pin | None

    @classmethod
    def of(cls, servable: Served, standing: Standing, now: datetime) -> "LiveVersion":
        """Return what `/model/version` says of the live servable."""
        manifest = servable.manifest
        return cls(
            name=manifest.model,
            version=manifest.version,
            step=manifest.training.step,
            digest=servable.digest,
            manifest_digest=manifest.identity.digest,
            in_store=standing.in_store,
            term=manifest.term,
            run=manifest.run,
            published_at=manifest.created_at,
            loaded_at=servable.loaded_at,
            age_s=manifest.age_s(now),
            publish_to_served_s=servable.publish_to_served_s,
            drift=servable.drift,
            size_bytes=manifest.weights.size,
            architecture=manifest.architecture,
            signature=manifest.signature,
            ema=manifest.ema,
            training=manifest.training,
            pin=standing.pin,
        )


class VersionState(_Schema):
    """Where one version is in its life."""

    version: int
    manifest_digest: str | None = Field(description="Null until its manifest has been read.")
    state: State
    since: datetime
    step: int | None
    digest: str | None
    reason: Reason | None
    detail: str | None
    timings_s: dict[str, float]

    @classmethod
    def of(cls, record: Record) -> "VersionState":
        """Return what `/model/versions` says of one version."""
        return cls(
            version=record.version,
            manifest_digest=record.identity.digest or None,
            state=record.state,
            since=record.since,
            step=record.step,
            digest=record.digest,
            reason=record.reason,
            detail=record.detail,
            timings_s=dict(record.timings_s),
        )


class Versions(_Schema):
    """The newest versions first; `status` is what the watcher last concluded."""

    live: int | None
    pin: Pin | None
    status: str
    versions: list[VersionState]

    @classmethod
    def of(cls, standing: Standing) -> "Versions":
        """Return what `/model/versions` says."""
        return cls(
            live=standing.live.version if standing.live else None,
            pin=standing.pin,
            status=standing.status,
            versions=[VersionState.of(record) for record in standing.records],
        )


class PinRequest(_Schema):
    """The version to pin, and why, for whoever finds the pin later."""

    # In strict mode true, 1.0 and "1" are no whole numbers.
    version: Annotated[int, Field(strict=True, ge=1, le=10**15)]
    reason: Annotated[str, Field(strict=True, max_length=MAX_REASON)] = ""


class PinState(_Schema):
    """The pin, and the version that is live now."""

    pin: Pin | None
    live: int | None
    status: str

    @classmethod
    def of(cls, standing: Standing) -> "PinState":
        """Return what operators are told."""
        live = standing.live.version if standing.live else None
        return cls(pin=standing.pin, live=live, status=standing.status)


class Health(_Schema):
    """The process is alive."""

    status: str


class Readiness(_Schema):
    """Whether requests should come here, and why not."""

    ready: bool
    version: int | None
    reason: str | None
