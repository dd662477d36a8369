"""The training loop: step, evaluate, publish, save. Reads top to bottom."""

import contextlib
import threading

import torch

from trainer.display import Display
from trainer.distributed import Ranks
from trainer.output import Output
from trainer.precision import set_deterministic
from trainer.run import Run
from trainer.settings import TrainerSettings
from trainer.tasks import Task


def prepare(settings: TrainerSettings) -> None:
    """Set what torch reads before it uses a device in this process."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.deterministic:
        set_deterministic()


def train(settings: TrainerSettings, task: Task, display: Display, stop: threading.Event, ranks: Ranks) -> int:
    """Train until `settings.steps` steps are made (0: without end) or `stop` is set on any rank; return the steps made.

    Raises `Fenced` when another publisher has taken over the store, and `EmaswapError` when the store cannot be opened,
    the checkpoint belongs to another run, the batch cannot be split evenly, or the last version was not published.
    """
    ranks.share((torch.empty(settings.batch_size),), settings.accumulate)
    run = Run(settings, task, ranks)
    if restored := run.restore():
        display.say(restored)
    ranks.agree(run.steps, f"the step to resume at; every rank must see the newest checkpoint in {settings.resume}")

    with Output(settings, task, run, display) if ranks.leads else contextlib.nullcontext() as output:
        # Ask once per step whether to stop, so that the step that ends the run is the one published and saved.
        stopping = ranks.any(stop.is_set())
        while (run.steps < settings.steps or not settings.steps) and not stopping:
            run.step()
            stopping = ranks.any(stop.is_set())
            if output:
                output.step(last=stopping or run.steps == settings.steps)
    return run.steps
