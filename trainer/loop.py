"""The training loop: train, average, evaluate, publish, save. Reads top to bottom."""

import contextlib
import math
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emaswap import EMA, EmaswapError, Fenced, ModelEMA, Publisher, PublishError
from trainer import checkpoint
from trainer.display import Display
from trainer.settings import TrainerSettings
from trainer.tasks import Task

# The displayed loss looks back over about 50 steps.
_LOSS_ALPHA = 0.02
# What must be the same for a checkpoint to be of the same run.
_IDENTITY = ("task", "seed", "batch_size", "steps")


def train(settings: TrainerSettings, task: Task, display: Display, stop: threading.Event) -> int:
    """Train until `settings.steps` are done or `stop` is set; the number of steps done.

    Raises `Fenced` when another publisher takes the store over, `EmaswapError` when the store cannot be opened, a
    checkpoint is of another run, or the last version could not be published.
    """
    device = pick_device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    model = task.build_model().to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    shape = partial(warmup_and_cosine, warmup=settings.warmup_steps, steps=settings.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    ema = ModelEMA(model, decay=settings.ema_decay, tau=settings.ema_tau)
    loss_average: EMA[Tensor] = EMA(_LOSS_ALPHA)
    run = Run(settings, model, optimizer, schedule, ema, loss_average)

    step = last = run.restore()
    if step:
        display.say(f"going on at step {step} from {settings.resume}")
    with Publisher(
        settings.store,
        model=task.name,
        architecture=task.architecture(),
        signature=task.signature(),
        probe=task.probe(),
        keep=settings.keep,
        on_publish=display.published,
    ) as publisher:
        while step < settings.steps and not stop.is_set():
            batch = tuple(part.to(device) for part in task.batch(step, settings.batch_size, settings.seed))
            model.train()
            with autocast(device):
                loss = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            ema.update(model)
            loss_average.update(loss)
            step += 1
            display.step(step)
            if step % settings.publish_every == 0:
                publish(step)
        if step != last:
            publish(step)
    return step


def evaluate(task: Task, model: nn.Module, ema: ModelEMA, device: torch.device) -> dict[str, float]:
    """The task's metrics of the raw and of the averaged weights, as "raw_..." and "ema_..."."""
    metrics = {}
    with torch.no_grad(), autocast(device):
        for kind, module in (("raw", model.eval()), ("ema", ema.ema)):
            metrics |= {f"{kind}_{name}": value for name, value in task.evaluate(module, device).items()}
    return metrics


def publish(publisher: Publisher, ema: ModelEMA, step: int, metrics: Mapping[str, float], display: Display) -> None:
    """Publish, and go on training when an earlier version could not be: a full disk is no reason to lose a run."""
    try:
        publisher.publish(ema, step=step, metrics=metrics)
    except Fenced:
        raise
    except PublishError as error:
        display.say(f"warning: {error}; training goes on")


class Run:
    """Everything that a training checkpoint holds, saved and restored together."""

    def __init__(
        self,
        settings: TrainerSettings,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
        ema: ModelEMA,
        loss_average: EMA[Tensor],
    ) -> None:
        self.folder: Path | None = settings.resume
        self.identity = {name: getattr(settings, name) for name in _IDENTITY}
        self.parts: dict[str, Any] = {
            "model": model,
            "optimizer": optimizer,
            "schedule": schedule,
            "ema": ema,
            "loss_average": loss_average,
        }

    def save(self, step: int) -> None:
        """Save a checkpoint, where there is a folder for it."""
        if self.folder is not None:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            random = checkpoint.random_state()
            checkpoint.save(self.folder, step, {**state, "step": step, "identity": self.identity, "random": random})

    def restore(self) -> int:
        """Go on from the newest checkpoint; the step it was saved at, 0 when there is none."""
        state = checkpoint.load(self.folder) if self.folder is not None else None
        if state is None:
            return 0
        if state["identity"] != self.identity:
            raise EmaswapError(
                f"the checkpoint in {self.folder} is of another run: it has {state['identity']}, "
                f"this one {self.identity}; give the same settings, or another --resume directory"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        checkpoint.set_random_state(state["random"])
        step: int = state["step"]
        return step


def pick_device(name: str) -> torch.device:
    """The device a setting means. Raises `EmaswapError` when it is CUDA and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise EmaswapError("--device cuda: torch sees no CUDA device here; use --device auto or cpu")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """bfloat16 where a GPU does the work; float32 on the CPU, where it would be slower."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def warmup_and_cosine(step: int, *, warmup: int, steps: int) -> float:
    """A factor for the learning rate: rising linearly over `warmup` steps, then falling as a half cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


