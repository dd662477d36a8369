"""Settings of the trainer: each is a flag and an `EMASWAP_...` variable, read once."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError, field_validator
from pydantic_settings import SettingsConfigDict

from emaswap.averaging.schedule import SCHEDULES
from emaswap.settings import CommandSettings, CommaSeparated
from emaswap.versions.manifest import VariantName


class Resuming(Enum):
    """Whether a setting may change when a run resumes from a checkpoint."""

    FIXED = "the checkpoint of a run with another value belongs to another run"
    FREE = "any value may be given"


_T = TypeVar("_T")
Fixed = Annotated[_T, Resuming.FIXED]
Free = Annotated[_T, Resuming.FREE]

_VARIANT = TypeAdapter(tuple[VariantName, float])


class TrainerSettings(CommandSettings):
    """Train a model, average its weights, and publish versions of the average to a store."""

    model_config = SettingsConfigDict(cli_prog_name="python -m trainer", cli_implicit_flags=True)

    store: Free[str] = Field(description="Directory of the store to publish to; it is created if it does not exist.")
    task: Fixed[str] = Field(
        "digits", description="What to train: `digits`, `mnist5k`, or a task of your own as `package.module:Class`."
    )
    steps: Fixed[int] = Field(
        2000,
        ge=0,
        description="Optimizer steps to train for, in total; 0 trains until stopped, at a constant learning rate.",
    )
    publish_every: Free[int] = Field(100, ge=1, description="Publish a version every so many steps.")
    publish_dtype: Free[Literal["float32", "bfloat16", "float16"] | None] = Field(
        None, description="Floating-point type to publish the weights in; by default their own."
    )
    device: Free[Literal["auto", "cpu", "cuda"]] = Field(
        "auto",
        description="Where to train; `auto` uses CUDA if it is available. Under torchrun, each local rank has its own "
        "device.",
    )
    precision: Fixed[Literal["auto", "fp32", "bf16", "fp16"]] = Field(
        "auto",
        description="Precision of autocast: `auto` is bf16 on CUDA (fp16 where bf16 is not supported) and fp32 on the "
        "CPU; fp16 scales the loss.",
    )
    tf32: Free[bool] = Field(
        True, description="Let CUDA multiply float32 in TF32, which rounds to 10 bits; `--no-tf32` turns it off."
    )
    compile: Free[bool] = Field(False, description="Compile the training module with torch.compile.")
    deterministic: Free[bool] = Field(
        False, description="Use deterministic algorithms only; an operation that has none is an error."
    )
    seed: Fixed[int] = Field(0, ge=0, description="Seed of the initial weights, data order, augmentation and dropout.")
    resume: Free[Path | None] = Field(
        None, description="Directory of training checkpoints: resume from the newest one there, and save new ones."
    )
    batch_size: Fixed[int] = Field(64, ge=1, description="Rows in a training batch, over all ranks together.")
    accumulate: Free[int] = Field(
        1, ge=1, description="Micro-batches that a batch is split into, computed one after another to save memory."
    )
    learning_rate: Fixed[float] = Field(2e-3, gt=0, description="Peak learning rate of AdamW.")
    lr_schedule: Fixed[Literal["cosine", "constant"]] = Field(
        "cosine",
        description="Learning rate after the warm-up; without an end (`--steps 0`) it is always constant.",
    )
    final_learning_rate: Fixed[float] = Field(
        0.0, ge=0, le=1, description="Where the cosine ends, as a share of the peak learning rate."
    )
    weight_decay: Fixed[float] = Field(0.05, ge=0, description="Weight decay of AdamW.")
    warmup_steps: Fixed[int] = Field(50, ge=0, description="Steps over which the learning rate rises to its peak.")
    clip_norm: Fixed[float | None] = Field(
        None, gt=0, description="Largest norm of the gradient; a larger gradient is scaled down to it."
    )
    ema_schedule: Fixed[Literal[SCHEDULES]] = Field(  # type: ignore[valid-type]
        "exponential_ramp", description="Schedule of the average's decay."
    )
    ema_decay: Fixed[float] = Field(
        0.995,
        ge=0,
        lt=1,
        description="Final decay of the average: it spans 1/(1−decay) steps. Not for `power_function`.",
    )
    ema_tau: Fixed[float] = Field(
        100, gt=0, description="Time constant, in steps, with which the decay of `exponential_ramp` rises."
    )
    ema_sigma_rel: Fixed[float] = Field(
        0.1, gt=0, lt=0.2887, description="Width of `power_function`, as a share of the steps so far."
    )
    ema_scale: Fixed[float] = Field(
        1.0,
        gt=0,
        description="How many times larger the batch is than the one the decay was chosen for: the decay is raised to "
        "this power.",
    )
    ema_update_every: Fixed[int] = Field(1, ge=1, description="Update the average every so many steps.")
    ema_buffers: Fixed[Literal["average", "copy"]] = Field(
        "average", description="Whether floating-point buffers (batch norm's statistics) are averaged or copied."
    )
    ema_variant: Fixed[CommaSeparated] = Field(
        (),
        description="Further average to keep, evaluate and publish as a variant: `NAME=SIGMA_REL` of a power function; "
        "may be repeated, or separated by commas.",
    )
    keep: Free[int] = Field(10, ge=1, description="How many of the newest versions the store keeps.")
    heartbeat: Free[Path | None] = Field(
        None, description="File to touch at each step: `python -m trainer.health` checks its age."
    )
    log_dir: Free[Path | None] = Field(None, description="Directory to record the run's metrics in.")
    log_every: Free[int] = Field(10, ge=1, description="Record the training loss every so many steps.")
    threads: Free[int] = Field(
        0, ge=0, description="Threads that torch computes with on the CPU; 0 leaves the choice to torch."
    )
    ranks_timeout_s: Free[float] = Field(
        600.0,
        gt=0,
        description="Seconds that ranks wait for one another before the run fails; they wait while rank 0 evaluates "
        "and saves.",
    )

    @field_validator("ema_variant")
    @classmethod
    def _check_variants(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            try:
                _variant(text)
            except ValidationError:
                raise ValueError(f"expected NAME=SIGMA_REL such as short=0.05, got {text!r}") from None
        return value

    @property
    def variants(self) -> dict[str, float]:
        """The relative width of each further average, by name."""
        return dict(map(_variant, self.ema_variant))

    def fixed(self) -> dict[str, object]:
        """Return the settings that make a checkpoint another run's when they differ."""
        return {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if Resuming.FIXED in field.metadata
        }


def _variant(text: str) -> tuple[str, float]:
    name, _, width = text.partition("=")
    return _VARIANT.validate_python((name, width))
