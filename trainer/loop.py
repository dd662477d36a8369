"""The training loop: train, average, evaluate, publish, save. Reads top to bottom."""

import contextlib
import threading

import torch

from trainer.display import Display
from trainer.distributed import Ranks
from trainer.output import Output
from trainer.precision import set_deterministic, set_float32
from trainer.randomness import seed_run, seed_step
from trainer.run import Run
from trainer.settings import TrainerSettings
from trainer.tasks import Task


def prepare(settings: TrainerSettings) -> None:
    """What is to be set in this process before torch uses a device."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.deterministic:
        set_deterministic()


def train(settings: TrainerSettings, task: Task, display: Display, stop: threading.Event, ranks: Ranks) -> int:
    """Train until `settings.steps` are done (0: without end) or `stop` is set on any rank; the number of steps done.

    Raises `Fenced` when another publisher takes the store over, `EmaswapError` when the store cannot be opened, a
    checkpoint is of another run, the batch cannot be shared out, or the last version could not be published.
    """
    ranks.share((torch.empty(settings.batch_size),), settings.accumulate)
    set_float32(ranks.device, tf32=settings.tf32)
    seed_run(settings.seed)
    run = Run(settings, task, ranks)
    if restored := run.restore():
        display.say(restored)
    ranks.agree(run.step, f"the step to go on at; all of them must see the newest checkpoint in {settings.resume}")

    with Output(settings, task, run, display) if ranks.leads else contextlib.nullcontext() as output:
        # Whether to stop is asked once a step, so that the step that ends the run is the one published and saved.
        stopping = ranks.any(stop.is_set())
        while (run.step < settings.steps or not settings.steps) and not stopping:
            seed_step(settings.seed, run.step, ranks.rank, ranks.device)
            run.train_on(task.batch(run.step, settings.batch_size, settings.seed), ranks)
            stopping = ranks.any(stop.is_set())
            if output:
                output.step(last=stopping or run.step == settings.steps)
    return run.step
