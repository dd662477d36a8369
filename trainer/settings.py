"""The trainer's settings: each a flag and an `EMASWAP_...` variable, read once."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from emaswap.settings import CommandSettings, CommaSeparated

# Of a version's variant.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class TrainerSettings(CommandSettings):
    """Train a model, keep the exponential moving average of its weights, and publish versions of it to a store."""

    model_config = SettingsConfigDict(cli_prog_name="python -m trainer", cli_implicit_flags=True)

    store: str = Field(description="Directory of the store to publish to; it is made when it is not there.")
    task: str = Field(
        "digits", description="What to train: `digits`, `mnist5k`, or a task of your own as `package.module:Class`."
    )
    steps: int = Field(
        2000,
        ge=0,
        description="Optimizer steps to train for, in all; 0 trains until stopped, at a constant learning rate.",
    )
    publish_every: int = Field(100, ge=1, description="Steps from one published version to the next.")
    publish_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Floating-point type that the weights are published in; their own without it."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Where to train; `auto` takes CUDA when it is there. Under torchrun, one device a local rank.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="What autocast computes in: `auto` is bf16 on CUDA (fp16 where it has none) and fp32 on the CPU; "
        "fp16 scales the loss.",
    )
    tf32: bool = Field(True, description="Let CUDA multiply float32 in TF32, which rounds to 10 bits; or `--no-tf32`.")
    compile: bool = Field(False, description="Compile the module that trains with torch.compile.")
    deterministic: bool = Field(False, description="Use algorithms that give the same bits each time, or fail.")
    seed: int = Field(0, ge=0, description="Seed of initial weights, data order, augmentation and dropout.")
    resume: Path | None = Field(
        None, description="Directory of training checkpoints: save there, and go on from the newest one found there."
    )
    batch_size: int = Field(64, ge=1, description="Rows in a training batch, over all ranks together.")
    accumulate: int = Field(
        1, ge=1, description="Parts that a batch is computed in, one after another, to save memory."
    )
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="What the learning rate does after its peak; without an end (`--steps 0`) it stays there."
    )
    final_learning_rate: float = Field(
        0.0, ge=0, le=1, description="Where the cosine ends, as a share of the peak learning rate."
    )
    weight_decay: float = Field(0.05, ge=0, description="Weight decay of AdamW.")
    warmup_steps: int = Field(50, ge=0, description="Steps over which the learning rate rises to its peak.")
    clip_norm: float | None = Field(
        None, gt=0, description="Largest norm of the gradient; a larger one is scaled down."
    )
    ema_schedule: Literal["constant", "exponential_ramp", "count_ramp", "inverse_gamma", "power_function"] = Field(
        "exponential_ramp", description="How the decay of the average goes with the number of the step."
    )
    ema_decay: float = Field(
        0.995,
        ge=0,
        lt=1,
        description="Final decay of the average: it spans 1/(1−decay) steps. Not for `power_function`.",
    )
    ema_tau: float = Field(100, gt=0, description="Steps over which the decay of `exponential_ramp` ramps up.")
    ema_sigma_rel: float = Field(
        0.1, gt=0, lt=0.2887, description="Width of `power_function`, as a share of the steps so far."
    )
    ema_scale: float = Field(
        1.0, gt=0, description="Factor of the batch size since the decay was chosen: the decay is taken to this power."
    )
    ema_update_every: int = Field(1, ge=1, description="Steps from one update of the average to the next.")
    ema_buffers: Literal["average", "copy"] = Field(
        "average", description="Whether floating-point buffers (batch norm's statistics) are averaged or copied."
    )
    ema_variant: CommaSeparated = Field(
        (),
        description="Further average to keep, evaluate and publish as a variant: `NAME=SIGMA_REL` of a power function; "
        "may be repeated, or separated by commas.",
    )
    keep: int = Field(10, ge=1, description="How many of the newest versions the store keeps.")
    heartbeat: Path | None = Field(
        None, description="File to touch at each step: `python -m trainer.health` looks at its age."
    )
    log_dir: Path | None = Field(None, description="Directory to record the run's figures in, step by step.")
    log_every: int = Field(10, ge=1, description="Steps from one recorded training loss to the next.")
    threads: int = Field(0, ge=0, description="Threads that torch computes with on the CPU; 0 leaves it to torch.")
    ranks_timeout_s: float = Field(
        600.0,
        gt=0,
        description="Seconds that ranks wait for one another before the run fails; rank 0 evaluates and saves alone.",
    )

    @field_validator("ema_variant")
    @classmethod
    def _named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            name, _, width = text.partition("=")
            if not _NAME.fullmatch(name) or not _is_number(width):
                raise ValueError(f"expected NAME=SIGMA_REL such as short=0.05, got {text!r}")
        return value

    @property
    def variants(self) -> dict[str, float]:
        """The relative width of each further average, by its name."""
        return {name: float(width) for name, _, width in (text.partition("=") for text in self.ema_variant)}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
