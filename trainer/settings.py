"""The trainer's settings: each a flag and an `EMASWAP_...` variable, read once."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from emaswap.settings import CommandSettings


class TrainerSettings(CommandSettings):
    """Train a model, keep the exponential moving average of its weights, and publish versions of it to a store."""

    model_config = SettingsConfigDict(cli_prog_name="python -m trainer")

    store: str = Field(description="Directory of the store to publish to; it is made when it is not there.")
    task: str = Field("digits", description="What to train: `digits`, or a task of your own as `package.module:Class`.")
    steps: int = Field(
        2000,
        ge=0,
        description="Optimizer steps to train for, in all; 0 trains until stopped, at a constant learning rate.",
    )
    publish_every: int = Field(100, ge=1, description="Steps from one published version to the next.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to train; `auto` takes CUDA when it is there, with bfloat16 autocast."
    )
    seed: int = Field(0, ge=0, description="Seed of initial weights, data order and augmentation.")
    resume: Path | None = Field(
        None, description="Directory of training checkpoints: save there, and go on from the newest one found there."
    )
    batch_size: int = Field(64, ge=1, description="Rows in a training batch.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.05, ge=0, description="Weight decay of AdamW.")
    warmup_steps: int = Field(50, ge=0, description="Steps over which the learning rate rises to its peak.")
    ema_decay: float = Field(0.995, ge=0, lt=1, description="Final decay of the average: it spans 1/(1−decay) steps.")
    ema_tau: float = Field(100, gt=0, description="Steps over which the decay ramps up.")
    keep: int = Field(10, ge=1, description="How many of the newest versions the store keeps.")
    heartbeat: Path | None = Field(
        None, description="File to touch at each step: `python -m trainer.health` looks at its age."
    )
    threads: int = Field(0, ge=0, description="Threads that torch computes with on the CPU; 0 leaves it to torch.")
