"""Learner: improves a model by one batch. Knows gradients, but no averages, stores or displays."""

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed import Ranks
from trainer.learning_rate import warmup_and_constant, warmup_and_cosine
from trainer.precision import Precision
from trainer.settings import TrainerSettings
from trainer.tasks import Batch, Task


class Learner:
    """AdamW with its learning rate, loss scaling, clipping, and gradients summed over ranks and micro-batches."""

    def __init__(self, settings: TrainerSettings, task: Task, model: nn.Module, ranks: Ranks) -> None:
        """Train `model`, which is on the ranks' device. Its parameters and buffers remain the same tensor objects."""
        self.precision = Precision.of(settings.precision, ranks.device)
        self.grad_norm: Tensor | None = None
        """The norm of the last gradient before clipping; `None` without clipping."""
        self._task, self._ranks = task, ranks
        self._accumulate, self._clip_norm = settings.accumulate, settings.clip_norm
        self._wrapped = ranks.wrap(model)
        self._module = cast(nn.Module, torch.compile(self._wrapped)) if settings.compile else self._wrapped
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            # A fused AdamW skips overflowed steps internally, so we could not tell that a step was skipped.
            fused=ranks.device.type == "cuda" and self.precision.name != "fp16",
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, _factor(settings))
        self._scaler = self.precision.scaler()
        self._stepped = False
        self._optimizer.register_step_post_hook(self._note_step)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self._schedule.get_last_lr()[0])

    @property
    def scale(self) -> float:
        """The factor of the loss when gradients are computed: 1 except in fp16."""
        return float(self._scaler.get_scale())

    def backward(self, batch: Batch) -> Tensor:
        """Compute the gradients of a global batch's mean loss on every rank; return that loss, a detached scalar."""
        self._wrapped.train()
        self._optimizer.zero_grad()
        parts = self._ranks.share(batch, self._accumulate)
        total = torch.zeros((), device=self._ranks.device)
        for left, part in zip(reversed(range(len(parts))), parts, strict=True):
            # Ranks exchange gradients once, after the last micro-batch.
            with self._alone() if left else contextlib.nullcontext():
                loss = self._loss(part) / len(parts)
                self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return self._ranks.mean(total)

    def step(self) -> bool:
        """Update the weights by the gradients. Return False, and change nothing, if the gradients overflowed in fp16."""
        if self._clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            self.grad_norm = nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._stepped = False
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._stepped:
            self._schedule.step()
        return self._stepped

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the optimizer, the learning rate and the loss scale."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])

    @property
    def _parts(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer, "schedule": self._schedule, "scaler": self._scaler}

    def _loss(self, part: Batch) -> Tensor:
        on_device = tuple(tensor.to(self._ranks.device, non_blocking=True) for tensor in part)
        with self.precision.autocast():
            return self._task.loss(self._module, on_device)

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        if isinstance(self._wrapped, DistributedDataParallel):
            return self._wrapped.no_sync()
        return contextlib.nullcontext()

    def _note_step(self, *_: object) -> None:
        self._stepped = True


def _factor(settings: TrainerSettings) -> partial[float]:
    if settings.lr_schedule == "constant":
        return partial(warmup_and_constant, warmup=settings.warmup_steps)
    return partial(
        warmup_and_cosine,
        warmup=settings.warmup_steps,
        steps=settings.steps,
        final=settings.final_learning_rate,
    )
