"""Following optimizers: whether one has made a step since this was last asked."""

import logging

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


class Following:
    """Watches the steps of optimizers, and says once when the weights change without one."""

    def __init__(self) -> None:
        self._stepped = False
        self._seen: int | None = None
        self._told = False

    def add(self, optimizer: torch.optim.Optimizer) -> None:
        """Watch this optimizer, too."""
        optimizer.register_step_post_hook(self._note)

    def has_stepped(self, model: nn.Module) -> bool:
        """Return whether an optimizer made a step since this was last asked."""
        stepped, self._stepped = self._stepped, False
        seen, self._seen = self._seen, _changes(model)
        if not stepped and not self._told and seen is not None and seen != self._seen:
            self._told = True
            log.warning(
                "the weights change, but no optimizer that the average follows makes a step, so the average stays as it is; "
                "if another optimizer took over, call follow() with that one"
            )
        return stepped

    def give_back(self) -> None:
        """Count the step that `has_stepped` told of once more: nothing came of it."""
        self._stepped = True

    def forget(self) -> None:
        """Take no notice of what has changed the weights since this was last asked."""
        self._seen = None

    def _note(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        # GradScaler hands a fused optimizer its flag, and leaves it to that to leave the step out.
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        if found_inf is None or not found_inf.item():
            self._stepped = True
        else:
            self.forget()  # the kernel has touched the weights, and has not changed them


def _changes(model: nn.Module) -> int:
    """Return a number that grows whenever a parameter is changed in place. Of shards nobody can tell."""
    return sum(
        parameter._version
        for parameter in model.parameters()
        if not (parameter.is_inference() or hasattr(parameter, "device_mesh"))
    )
