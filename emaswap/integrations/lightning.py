"""Lightning: `Trainer(callbacks=[EmaswapCallback(...)])` averages the model and publishes the average."""

from collections.abc import Mapping
from typing import Any

from emaswap.integrations.bridge import Averaging

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("emaswap.integrations.lightning needs Lightning: pip install lightning") from error


class EmaswapCallback(Averaging, Callback):
    """Averages at every optimizer step, and publishes at intervals and at the end, with the logged metrics.

    The average is saved in Lightning's checkpoints and resumes exactly. Only the process of rank 0 publishes. A publish
    that fails is a warning; `Fenced` ends training. A run stopped by Ctrl-C or SIGTERM publishes its last average. A
    `fast_dev_run` publishes nothing.
    """

    @property
    def state_key(self) -> str:
        return f"emaswap[{self.name}]"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        publishes = trainer.is_global_zero and not trainer.fast_dev_run
        self.begin(pl_module, trainer.optimizers, step=trainer.global_step, publishes=publishes)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        # Not at the end of the previous batch: a validation may follow it, with metrics of the weights that are due.
        self.publish_average(trainer.callback_metrics)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.advance(trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.swap_in()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self.swap_out()
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.publish_average(trainer.callback_metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self.finish(trainer.callback_metrics)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        self.fail(exception, trainer.callback_metrics)

    def state_dict(self) -> dict[str, Any]:
        return self.saved()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.restore(state_dict)
