"""A run: everything that changes while training, saved and restored together."""

from typing import Any, Protocol

from emaswap import EmaswapError
from trainer import checkpoint
from trainer.settings import TrainerSettings

# What must be the same for a checkpoint to be of the same run.
_IDENTITY = (
    "task",
    "seed",
    "steps",
    "batch_size",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "ema_decay",
    "ema_tau",
)


class Stateful(Protocol):
    """What modules, optimizers, schedules and averages have in common."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


class Run:
    """The step that training is at, and the parts whose states make up a training checkpoint."""

    def __init__(self, settings: TrainerSettings, **parts: Stateful) -> None:
        self.step = 0
        self._folder = settings.resume
        self._identity = {name: getattr(settings, name) for name in _IDENTITY}
        self._parts = parts

    def save(self) -> None:
        """Save a checkpoint, where there is a folder for it."""
        if self._folder is None:
            return
        state = {
            "step": self.step,
            "identity": self._identity,
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "random": checkpoint.random_state(),
        }
        checkpoint.save(self._folder, self.step, state)

    def restore(self) -> bool:
        """Go on from the newest checkpoint, if there is one. Raises `EmaswapError` when it is of another run."""
        state = checkpoint.load(self._folder) if self._folder is not None else None
        if state is None:
            return False
        if state["identity"] != self._identity:
            raise EmaswapError(
                f"the checkpoint in {self._folder} is of another run: it has {state['identity']}, "
                f"this one {self._identity}; give the same settings, or another --resume directory"
            )
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        checkpoint.set_random_state(state["random"])
        self.step = state["step"]
        return True
