"""Run: everything that changes while training, saved and restored together."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from emaswap import EMA, EmaswapError
from trainer import checkpoint
from trainer.averaging import average_of
from trainer.distributed import Ranks
from trainer.learner import Learner
from trainer.precision import set_float32
from trainer.randomness import seed_run, seed_step
from trainer.settings import TrainerSettings
from trainer.tasks import Task

# The displayed loss averages over about 50 steps.
_LOSS_ALPHA = 0.02


class Stateful(Protocol):
    """What modules, optimizers, schedules and averages have in common."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


class Run:
    """The number of steps made, and the parts whose states make up a training checkpoint."""

    def __init__(self, settings: TrainerSettings, task: Task, ranks: Ranks) -> None:
        """Start a run with fresh weights from the seed, the same on every rank; the leading rank alone averages them."""
        set_float32(ranks.device, tf32=settings.tf32)
        seed_run(settings.seed)
        self.steps = 0
        self.model = task.build_model().to(ranks.device)
        # Copied before the ranks wrap the model, the average stays a plain module. The other ranks need none: after
        # each step all ranks have the same weights.
        self.ema = average_of(self.model, settings) if ranks.leads else None
        self.learner = Learner(settings, task, self.model, ranks)
        self.loss_average: EMA[Tensor] = EMA(_LOSS_ALPHA)
        self._settings, self._task, self._ranks = settings, task, ranks
        self._identity = settings.fixed() | {"precision": self.learner.precision.name}
        self._pieces = {"ranks": ranks.size, "micro-batches": settings.accumulate}

    def step(self) -> None:
        """Make one training step: draw the batch, change the weights by its gradients, and average them."""
        seed_step(self._settings.seed, self.steps, self._ranks.rank, self._ranks.device)
        batch = self._task.batch(self.steps, self._settings.batch_size, self._settings.seed)
        loss = self.learner.backward(batch)
        if self.learner.step() and self.ema:
            self.ema.update(self.model)
        self._ranks.share_buffers(self.model)
        self.loss_average.update(loss)
        self.steps += 1

    def save(self) -> None:
        """Save a checkpoint if the settings name a folder for it."""
        if self._settings.resume is None:
            return
        state = {
            "step": self.steps,
            "identity": self._identity,
            "pieces": self._pieces,
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
        }
        checkpoint.save(self._settings.resume, self.steps, state)

    def restore(self) -> str:
        """Resume from the newest checkpoint and return a message that says so; it is empty if there is no checkpoint.

        Raises `EmaswapError` when the checkpoint belongs to another run.
        """
        folder = self._settings.resume
        state = checkpoint.load(folder) if folder is not None else None
        if state is None:
            return ""
        if differing := _differing(state["identity"], self._identity):
            values = "; ".join(f"its {name} is {theirs}, this run's {ours}" for name, theirs, ours in differing)
            raise EmaswapError(
                f"the checkpoint in {folder} belongs to another run: {values}; "
                "give the same settings, or another --resume directory"
            )
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        self.steps = state["step"]
        message = f"resuming at step {self.steps} from {folder}"
        if differing := _differing(state["pieces"], self._pieces):
            used = "; ".join(
                f"the checkpoint used {theirs} {name}, this run {ours}" for name, theirs, ours in differing
            )
            message += f"; results will not be bit-identical: {used}"
        return message

    @property
    def _parts(self) -> dict[str, Stateful]:
        parts: dict[str, Stateful] = {
            "model": self.model,
            "learner": self.learner,
            "loss_average": self.loss_average,
        }
        return parts | {"ema": self.ema} if self.ema else parts


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[tuple[str, object, object]]:
    """Return the name and both values of each entry that differs."""
    names = {**theirs, **ours}
    return [(name, theirs.get(name), ours.get(name)) for name in names if theirs.get(name) != ours.get(name)]
