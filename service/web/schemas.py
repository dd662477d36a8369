"""What goes over HTTP as JSON: for validation of what is small, and for the documentation of all of it."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from emaswap import Pin, Reason, Signature
from emaswap.versions.architecture import Architecture
from emaswap.versions.manifest import EmaInfo, TrainingInfo
from service.control.lifecycle import Record, State
from service.serving.servable import Servable


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
    digest: str
    term: int
    run: str
    published_at: datetime
    loaded_at: datetime
    age_s: float = Field(description="Seconds since it was published.")
    publish_to_served_s: float
    drift: float | None = Field(description="Mean |difference| of its probe answers from its predecessor's.")
    size_bytes: int
    architecture: Architecture
    signature: Signature
    ema: EmaInfo
    training: TrainingInfo
    pin: Pin | None

    @classmethod
    def of(cls, servable: Servable, pin: Pin | None, now: datetime) -> "LiveVersion":
        """What `/model/version` says of a servable."""
        manifest = servable.manifest
        return cls(
            name=manifest.model,
            version=manifest.version,
            step=manifest.training.step,
            digest=servable.digest,
            term=manifest.term,
            run=manifest.run,
            published_at=manifest.created_at,
            loaded_at=servable.loaded_at,
            age_s=(now - manifest.created_at).total_seconds(),
            publish_to_served_s=servable.publish_to_served_s,
            drift=servable.drift,
            size_bytes=manifest.weights.size,
            architecture=manifest.architecture,
            signature=manifest.signature,
            ema=manifest.ema,
            training=manifest.training,
            pin=pin,
        )


class VersionState(_Schema):
    """Where one version is in its life."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    version: int
    state: State
    since: datetime
    step: int | None
    digest: str | None
    reason: Reason | None
    detail: str | None
    timings_s: dict[str, float]


class Versions(_Schema):
    """The newest versions first; `status` is what the watcher last concluded."""

    live: int | None
    pin: Pin | None
    status: str
    versions: list[VersionState]

    @classmethod
    def of(cls, live: Servable | None, pin: Pin | None, status: str, records: list[Record]) -> "Versions":
        """What `/model/versions` says."""
        states = [VersionState.model_validate(record) for record in records]
        return cls(live=live.version if live else None, pin=pin, status=status, versions=states)


class PinRequest(_Schema):
    """The version to pin, and why: whoever finds the pin later will want to know."""

    version: Annotated[int, Field(ge=1, le=10**15)]
    reason: Annotated[str, Field(max_length=1000)] = ""


class PinState(_Schema):
    """The pin, and the version that is live now."""

    pin: Pin | None
    live: int | None
    status: str


class Health(_Schema):
    """The process is alive."""

    status: str


class Readiness(_Schema):
    """Whether requests should come here, and why not."""

    ready: bool
    version: int | None
    reason: str | None
