"""Hugging Face: `Trainer(..., callbacks=[EmaswapCallback(...)])` averages the model and publishes the average.

The Trainer does not tell its callbacks when an exception ends training. Importing this module wraps `Trainer.train`, so
that an `EmaswapCallback` is told.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from emaswap.integrations import sidecar
from emaswap.integrations.bridge import Averaging, warn_of

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(
        "emaswap.integrations.huggingface needs Transformers: pip install transformers accelerate"
    ) from error

log = logging.getLogger(__name__)


class EmaswapCallback(Averaging, TrainerCallback):
    """Averages at every optimizer step, and publishes at intervals and at the end, with the logged metrics.

    Each of the Trainer's checkpoints holds the average in a file of its own, from which it resumes exactly. To resume
    from a checkpoint outside `output_dir`, set `TrainingArguments.resume_from_checkpoint` as well. Only the process of
    rank 0 publishes. A publish that fails is a warning; `Fenced` ends training. A run stopped by Ctrl-C publishes its
    last average.
    """

    _metrics: Mapping[str, object] = MappingProxyType({})
    _validated = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        self._metrics = {}
        if state.global_step:
            folders = [Path(args.resume_from_checkpoint or ""), _checkpoint(args, state)]
            if saved := next(filter(None, (sidecar.load(folder, self._stem) for folder in folders)), None):
                self.restore(saved)
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner  # Accelerate's wrapper does not call step hooks
        self.begin(model, [optimizer], step=state.global_step, publishes=state.is_world_process_zero)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.swap_out()
        self._validated = False
        # Not at the end of the previous step: an evaluation may follow it, with metrics of the weights that are due.
        self.publish_average(self._metrics)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        self.advance(state.global_step)
        if control.should_evaluate:
            self.swap_in()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        if control.should_evaluate:
            self.swap_in()

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        if self._validated:
            log.warning("only the first of several evaluation datasets is evaluated with the averaged weights")
            self._validated = False

    def on_log(self, *_: Any, logs: dict[str, object], **__: Any) -> None:
        self._metrics = {**self._metrics, **logs}

    def on_evaluate(self, *_: Any, metrics: dict[str, object], **__: Any) -> None:
        self._validated = self.swapped
        self.swap_out()
        self._metrics = {**self._metrics, **metrics}
        self.publish_average(self._metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        if args.should_save:
            warn_of(partial(sidecar.save, _checkpoint(args, state), self._stem, self.saved()))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._validated = False
        self.finish(self._metrics)

    def on_exception(self, error: BaseException) -> None:
        """End training, which `error` has ended. The wrapped `Trainer.train` calls this."""
        self._validated = False
        self.fail(error, self._metrics)

    @property
    def _stem(self) -> str:
        return f"emaswap-{self.name}"


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _reporting(train: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Trainer.train` to tell every `EmaswapCallback` of an exception that ends it."""

    @wraps(train)
    def reporting(trainer: Trainer, *arguments: Any, **options: Any) -> Any:
        try:
            return train(trainer, *arguments, **options)
        except BaseException as error:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, EmaswapCallback):
                    callback.on_exception(error)
            raise

    return reporting


Trainer.train = _reporting(Trainer.train)
