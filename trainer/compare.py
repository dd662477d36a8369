"""`python -m trainer.compare`: compare the averaged weights with the raw ones while training is noisy.

Trains as `python -m trainer --lr-schedule constant` does, once per seed, without publishing, and writes a report. At a
constant learning rate the raw weights never settle, which is when an average should pay.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import SettingsConfigDict
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from emaswap import EmaswapError
from emaswap.device import pick_device
from emaswap.settings import CommandSettings
from trainer.curve import COLUMNS, Curve, reading, table
from trainer.distributed import Ranks
from trainer.evaluation import evaluate
from trainer.loop import prepare
from trainer.plot import plot_bands
from trainer.run import Run
from trainer.settings import TrainerSettings
from trainer.tasks import Task, find_task

_DOCUMENT, _PICTURE = "ema-vs-raw.md", "ema-vs-raw.png"


class CompareSettings(CommandSettings):
    """Compare the test accuracy of raw and averaged weights over several seeds, at a constant learning rate."""

    model_config = SettingsConfigDict(cli_prog_name="python -m trainer.compare")

    task: str = Field("mnist5k", description="Task to train; its metrics must include an accuracy.")
    seeds: int = Field(5, ge=1, description="Number of runs, with seeds 0, 1, 2, ...")
    steps: int = Field(2000, ge=1, description="Optimizer steps per run; the second half is the noisy phase.")
    evaluate_every: int = Field(50, ge=1, description="Evaluate every so many steps.")
    batch_size: int = Field(64, ge=1, description="Rows in a training batch.")
    learning_rate: float = Field(2e-3, gt=0, description="Learning rate of AdamW, constant after the warm-up.")
    ema_decay: float = Field(0.995, ge=0, lt=1, description="Final decay of the average.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train.")
    threads: int = Field(
        1,
        ge=0,
        description="Threads that torch computes with on the CPU; another number rounds differently; 0 leaves the choice to torch.",
    )
    folder: Path = Field(Path("docs"), description=f"Folder to write {_DOCUMENT} and {_PICTURE} to.")

    @field_validator("evaluate_every")
    @classmethod
    def _at_least_one(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("steps", value):
            raise ValueError(
                f"expected at most the number of steps, {info.data['steps']}, got {value}: nothing would be evaluated"
            )
        return value

    def trainer(self, seed: int) -> TrainerSettings:
        """Return the settings of one run: the trainer's defaults otherwise, whatever the environment says."""
        names = ("task", "steps", "batch_size", "learning_rate", "ema_decay", "device", "threads")
        return TrainerSettings.model_construct(
            store="", seed=seed, lr_schedule="constant", **{name: getattr(self, name) for name in names}
        )


def train(settings: CompareSettings, task: Task, seed: int) -> Curve:
    """Train once and evaluate at intervals. Raises `EmaswapError` when the task measures no accuracy."""
    of_trainer = settings.trainer(seed)
    prepare(of_trainer)
    run = Run(of_trainer, task, Ranks(device=pick_device(settings.device)))
    assert run.ema is not None, "a single rank averages"
    steps: list[int] = []
    evaluations: list[dict[str, float]] = []
    for _ in track(range(settings.steps), f"seed {seed}"):
        run.step()
        if run.steps % settings.evaluate_every == 0:
            metrics = evaluate(task, run.model, run.ema, run.learner.precision)
            if "raw_accuracy" not in metrics:
                raise EmaswapError(f"the task {task.name!r} measures no accuracy, only {', '.join(sorted(metrics))}")
            steps.append(run.steps)
            evaluations.append(metrics)
    raw, ema = (tuple(metrics[f"{kind}_accuracy"] for metrics in evaluations) for kind in ("raw", "ema"))
    return Curve(seed, tuple(steps), raw, ema)


def write(settings: CompareSettings, curves: Sequence[Curve]) -> None:
    """Write the report and its picture. Raises `EmaswapError` when that fails."""
    try:
        settings.folder.mkdir(parents=True, exist_ok=True)
        (settings.folder / _DOCUMENT).write_text(document(settings, curves))
        plot_bands(
            settings.folder / _PICTURE,
            f"{settings.task}: accuracy at a constant learning rate, {settings.seeds} seeds",
            curves[0].steps,
            [curve.raw for curve in curves],
            [curve.ema for curve in curves],
        )
    except OSError as error:
        raise EmaswapError(f"cannot write to {settings.folder}: {error.strerror}") from error


def document(settings: CompareSettings, curves: Sequence[Curve]) -> str:
    """Return the report in Markdown."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *table([curve.half(second=True) for curve in curves])]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings if name != "folder")
    return f"""# EMA against raw weights

At a constant learning rate the raw weights never settle. An average over the last few hundred steps should be better and
steadier. This report shows whether it was, for the task `{settings.task}`: the raw and the averaged weights of each run were
evaluated on held-out data every {settings.evaluate_every} steps.

![accuracy over optimizer steps]({_PICTURE})

Accuracy in the noisy phase, which is the second half of the steps. The last row is the mean ± standard deviation over the
seeds.

{lines}

{_filled(reading(curves))}

Three limits of this comparison: the held-out data is the same for all seeds, so the spread over seeds does not include
the choice of that data; neighbouring evaluations of one run are not independent; and a learning rate that falls to zero lets
the raw weights settle, which is a different case.

## How to reproduce it

`make compare` writes this report and its picture with the trainer's own defaults; none was chosen to suit the comparison.
This is the command that wrote it, with every setting:

```bash
python -m trainer.compare {flags}
```

{_filled(_circumstances(settings))}
"""


def _filled(text: str) -> str:
    return fill(text, 120, break_on_hyphens=False, break_long_words=False)


def _circumstances(settings: CompareSettings) -> str:
    """Return the paragraph on what else the figures depend on."""
    run = settings.trainer(seed=0)
    device = pick_device(settings.device).type
    threads = f" (threads: {torch.get_num_threads()})" if device == "cpu" else ""
    return (
        f"Each run is one of `python -m trainer --lr-schedule constant`: AdamW with a learning rate of {run.learning_rate:g} "
        f"after {run.warmup_steps} steps of warm-up, a weight decay of {run.weight_decay:g}, batches of {run.batch_size}, "
        f"and an EMA whose decay rises to {run.ema_decay:g} with a time constant of {run.ema_tau:g} steps. "
        f"It ran on {device.upper()}{threads}, torch {torch.__version__.partition('+')[0]}. On one machine the same seed "
        "gives the same figures; another processor or another number of threads rounds differently."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison with command-line arguments and return the exit status."""
    settings = CompareSettings.read(arguments)
    console = Console(highlight=False)
    try:
        task = find_task(settings.task)
        curves = [train(settings, task, seed) for seed in range(settings.seeds)]
        shown = Table(title="accuracy in the noisy phase", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in COLUMNS:
            shown.add_column(name, min_width=4 if name == "seed" else 7)  # fits into 80 columns
        for row in table([curve.half(second=True) for curve in curves]):
            shown.add_row(*row)
        console.print(shown, reading(curves), sep="\n")
        write(settings, curves)
    except EmaswapError as error:
        Console(stderr=True, highlight=False).print(f"compare: {error}", markup=False)
        return 1
    console.print(f"wrote {settings.folder / _DOCUMENT}, {settings.folder / _PICTURE}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
