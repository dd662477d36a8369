"""A run: everything that changes while training, saved and restored together."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from emaswap import EMA, EmaswapError
from trainer import checkpoint
from trainer.averaging import average_of
from trainer.distributed import Ranks
from trainer.learner import Learner
from trainer.settings import TrainerSettings
from trainer.tasks import Batch, Task

# The displayed loss looks back over about 50 steps.
_LOSS_ALPHA = 0.02

# What must be the same for a checkpoint to be of the same run. Where and in how many pieces it is computed need not be.
_IDENTITY = (
    "task",
    "seed",
    "steps",
    "batch_size",
    "learning_rate",
    "schedule",
    "final_learning_rate",
    "weight_decay",
    "warmup_steps",
    "clip_norm",
    "ema_schedule",
    "ema_decay",
    "ema_tau",
    "ema_sigma_rel",
    "ema_scale",
    "ema_update_every",
    "ema_buffers",
    "ema_variant",
)


class Stateful(Protocol):
    """What modules, optimizers, schedules and averages have in common."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


class Run:
    """The step that training is at, and the parts whose states make up a training checkpoint."""

    def __init__(self, settings: TrainerSettings, task: Task, ranks: Ranks) -> None:
        """Start a run: fresh weights from the seed, the same on every rank; their average on the leading one alone."""
        self.step = 0
        self.model = task.build_model().to(ranks.device)
        # Made of the model before ranks are joined for it, the average stays a plain module. The other ranks can do
        # without one: all have the same weights after a step, so theirs would be the same average.
        self.ema = average_of(self.model, settings) if ranks.leads else None
        self.learner = Learner(settings, task, self.model, ranks)
        self.loss_average: EMA[Tensor] = EMA(_LOSS_ALPHA)
        self._folder = settings.resume
        self._identity = {name: getattr(settings, name) for name in _IDENTITY}
        self._identity["precision"] = self.learner.precision.name
        self._pieces = {"ranks": ranks.size, "accumulate": settings.accumulate}

    def train_on(self, batch: Batch, ranks: Ranks) -> None:
        """Make a step: gradients, weights, average."""
        loss = self.learner.backward(batch)
        if self.learner.step() and self.ema:
            self.ema.update(self.model)
        ranks.share_buffers(self.model)
        self.loss_average.update(loss)
        self.step += 1

    def save(self) -> None:
        """Save a checkpoint, where there is a folder for it."""
        if self._folder is None:
            return
        state = {
            "step": self.step,
            "identity": self._identity,
            "pieces": self._pieces,
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
        }
        checkpoint.save(self._folder, self.step, state)

    def restore(self) -> str:
        """Go on from the newest checkpoint; what there is to say of it, nothing where there is none.

        Raises `EmaswapError` when it is of another run.
        """
        state = checkpoint.load(self._folder) if self._folder is not None else None
        if state is None:
            return ""
        if difference := _difference(state["identity"], self._identity):
            raise EmaswapError(
                f"the checkpoint in {self._folder} is of another run: {difference}; "
                "give the same settings, or another --resume directory"
            )
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        self.step = state["step"]
        said = f"going on at step {self.step} from {self._folder}"
        if difference := _difference(state["pieces"], self._pieces):
            said += f"; not bit by bit as before, since {difference}"
        return said

    @property
    def _parts(self) -> dict[str, Stateful]:
        parts: dict[str, Stateful] = {
            "model": self.model,
            "learner": self.learner,
            "loss_average": self.loss_average,
        }
        return parts | {"ema": self.ema} if self.ema else parts


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What is not the same, in words; empty when all is."""
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    return ", ".join(f"it has {name} {theirs.get(name)}, this one {ours.get(name)}" for name in names)
