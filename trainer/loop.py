"""The training loop: train, average, evaluate, publish, save. Reads top to bottom."""

import contextlib
import math
import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from emaswap import (
    EMA,
    BadVersion,
    EmaswapError,
    Fenced,
    Missing,
    ModelEMA,
    Publisher,
    PublishError,
    Store,
)
from emaswap.device import pick_device
from trainer import checkpoint
from trainer.display import Display
from trainer.run import Run
from trainer.settings import TrainerSettings
from trainer.tasks import Task

# The displayed loss looks back over about 50 steps.
_LOSS_ALPHA = 0.02


def train(settings: TrainerSettings, task: Task, display: Display, stop: threading.Event) -> int:
    """Train until `settings.steps` are done (0: without end) or `stop` is set; the number of steps done.

    Raises `Fenced` when another publisher takes the store over, `EmaswapError` when the store cannot be opened, a
    checkpoint is of another run, or the last version could not be published.
    """
    device = pick_device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    model = task.build_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    factor = partial(warmup_and_cosine, warmup=settings.warmup_steps, steps=settings.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    ema = ModelEMA(model, decay=settings.ema_decay, tau=settings.ema_tau)
    loss_average: EMA[Tensor] = EMA(_LOSS_ALPHA)
    run = Run(settings, model=model, optimizer=optimizer, schedule=schedule, ema=ema, loss_average=loss_average)
    if run.restore():
        display.say(f"going on at step {run.step} from {settings.resume}")

    publisher = open_publisher(settings, task, display)

    def keep() -> None:
        """Publish and save where training stands."""
        metrics = evaluate(task, model, ema, device) | {"train_loss": loss_average.get().item()}
        display.evaluated(metrics)
        warn_of(lambda: publisher.publish(ema, step=run.step, metrics=metrics), display)
        warn_of(run.save, display)

    if run.step > newest_step(publisher.store):
        keep()  # the run was ended before what it had reached was published
    stopping = stop.is_set()
    while (run.step < settings.steps or not settings.steps) and not stopping:
        batch = tuple(part.to(device) for part in task.batch(run.step, settings.batch_size, settings.seed))
        model.train()
        with autocast(device):
            loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        ema.update(model)
        loss_average.update(loss)
        run.step += 1
        display.step(run.step)
        if settings.heartbeat:
            settings.heartbeat.touch()
        # Read once a step, so that the step that ends the run is the one that is published and saved.
        stopping = stop.is_set()
        if stopping or run.step % settings.publish_every == 0 or run.step == settings.steps:
            keep()

    close_publisher(publisher, run.step, display)
    return run.step


def open_publisher(settings: TrainerSettings, task: Task, display: Display) -> Publisher:
    """A publisher of the task's model."""
    return Publisher(
        settings.store,
        model=task.name,
        architecture=task.architecture(),
        signature=task.signature(),
        probe=task.probe(),
        keep=settings.keep,
        on_publish=display.published,
    )


def close_publisher(publisher: Publisher, step: int, display: Display) -> None:
    """Publish what is pending. Raises what went wrong, unless the version of this last step is published all the same."""
    try:
        publisher.close()
    except PublishError as error:
        if isinstance(error, Fenced) or publisher.latest is None or publisher.latest.training.step < step:
            raise
        display.say(f"warning: {error}; the last version is published")


def warn_of(work: Callable[[], object], display: Display) -> None:
    """Do something that training can do without: a full disk, say, is no reason to lose a run. A fenced run must end."""
    try:
        work()
    except Fenced:
        raise
    except EmaswapError as error:
        display.say(f"warning: {error}; training goes on")


def newest_step(store: Store) -> int:
    """The training step of the newest version, 0 when there is none that can be read."""
    try:
        return store.manifest(store.newest()).training.step
    except (BadVersion, Missing):
        return 0


def evaluate(task: Task, model: nn.Module, ema: ModelEMA, device: torch.device) -> dict[str, float]:
    """The task's metrics of the raw and of the averaged weights, as "raw_..." and "ema_...".

    Whatever random numbers that draws, training goes on with those that it would have had.
    """
    metrics: dict[str, float] = {}
    random_state = checkpoint.random_state()
    with torch.no_grad(), autocast(device):
        for kind, module in (("raw", model.eval()), ("ema", ema.ema)):
            metrics |= {f"{kind}_{name}": value for name, value in task.evaluate(module, device).items()}
    checkpoint.set_random_state(random_state)
    return metrics


def autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """bfloat16 where a GPU does the work; float32 on the CPU, where it would be slower."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def warmup_and_cosine(step: int, *, warmup: int, steps: int) -> float:
    """A factor for the learning rate: rising linearly over `warmup` steps, then falling as a half cosine to 0.

    Without an end (`steps` 0) it stays at its peak.
    """
    if step < warmup:
        return (step + 1) / warmup
    if not steps:
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
