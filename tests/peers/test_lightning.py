"""Lightning: a normal run of its Trainer publishes, and what is published is the average."""

import ast
import importlib.util
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from emaswap import Architecture, DirectoryStore, Fenced, ModelEMA
from emaswap.models.digits import DigitsNet
from tests.peers.oracle import Recorder, assert_close, lines_of, published, weights_of
from tests.peers.trial import DECAY, IMAGES, LABELS, break_store, callback_settings, take_over
from tests.serving import ROOT, wait_for

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not importlib.util.find_spec("lightning"), reason="Lightning is not installed"),
    pytest.mark.filterwarnings("ignore"),  # its warnings are about its own settings
]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Lightning writes into the test's folder."""
    monkeypatch.chdir(tmp_path)


def task() -> Any:
    """A LightningModule with a network and a recorder of its average. Built anew it starts the same."""
    from lightning.pytorch import LightningModule

    class Task(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = DigitsNet(width=4)
            self.recorder = Recorder(self.net, lambda _: DECAY)
            self.failing = False
            self.validated: list[dict[str, Tensor]] = []

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            images, labels = batch
            loss = nn.functional.cross_entropy(self.net(images), labels)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            images, labels = batch
            if index == 0 and not self.trainer.sanity_checking:
                self.validated.append({name: tensor.clone() for name, tensor in self.net.state_dict().items()})
            if self.failing:
                raise RuntimeError("validation fails")
            self.log("val_accuracy", (self.net(images).argmax(1) == labels).float().mean())
            self.log("val_step", float(self.trainer.global_step))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
            self.recorder.follow(optimizer)
            return optimizer

    return Task()


def callback(store: DirectoryStore | Path, **options: Any) -> Any:
    """The callback, with a version every four steps."""
    from emaswap.integrations.lightning import EmaswapCallback

    return EmaswapCallback(store, **callback_settings(**options))


def fit(model: Any, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> Any:
    """Train on batches of 16 on the CPU, and validate."""
    from lightning.pytorch import Trainer

    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(callbacks=list(callbacks), **settings | options)
    data = TensorDataset(IMAGES, LABELS)
    torch.manual_seed(2)
    resume = {"ckpt_path": ckpt_path, "weights_only": True} if ckpt_path else {}
    trainer.fit(model, DataLoader(data, batch_size=16), DataLoader(data, batch_size=48), **resume)
    return trainer


def test_a_run_publishes_its_average(store: DirectoryStore) -> None:
    """A version every n steps and one at the end, each with the average of just that step, and the logged metrics."""
    model = task()
    fit(model, callback(store, on_publish=None), max_epochs=3)
    versions = published(store)
    steps = [manifest.training.step for manifest in versions]
    assert steps[-1] == 18
    assert set(steps) <= {4, 8, 12, 16, 18}
    for manifest in versions:
        assert_close(weights_of(store, manifest), model.recorder.averages[manifest.training.step])
    last = versions[-1]
    assert last.ema.updates == 18
    assert last.ema.schedule is not None
    assert last.ema.schedule.name == "constant"
    assert {"train_loss", "val_accuracy"} <= last.training.metrics.keys()
    assert last.training.metrics["val_step"] == 18


def test_a_version_has_the_metrics_of_the_validation_after_its_step(store: DirectoryStore) -> None:
    """A version that is due when validation follows has that validation's metrics, and no older ones."""
    fit(task(), callback(store, every_n_steps=6, on_publish=None))
    found = [(manifest.training.step, manifest.training.metrics["val_step"]) for manifest in published(store)]
    assert found in ([(6, 6), (12, 12)], [(12, 12)])  # the second may come before the first is begun


def test_accumulated_gradients_are_one_update(store: DirectoryStore) -> None:
    """The average is updated once an optimizer step, not once a batch."""
    model, averaging = task(), callback(store)
    trainer = fit(model, averaging, accumulate_grad_batches=3)
    assert averaging.ema.updates == trainer.global_step == 4
    assert_close(averaging.ema.ema.state_dict(), model.recorder.averages[4])
    assert [manifest.training.step for manifest in published(store)] == [4]


def test_a_step_that_the_scaler_leaves_out_is_no_update(store: DirectoryStore) -> None:
    """With float16 gradients, a step that overflows is not made, and the average does not count it."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    # So large a scale that the first gradients overflow; each that does halves it.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)
    model, averaging = task(), callback(store)
    trainer = fit(model, averaging, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    made = len(model.recorder.averages) - 1
    assert 0 < made < trainer.global_step
    assert averaging.ema.updates == made
    assert_close(averaging.ema.ema.state_dict(), model.recorder.averages[-1])


def test_a_resumed_run_goes_on_exactly(store: DirectoryStore, tmp_path: Path) -> None:
    """Saved after half the steps and gone on in a new trainer, raw and averaged weights are the same to the last bit."""
    straight, at_once = task(), callback(store)
    fit(straight, at_once)
    fit(task(), callback(tmp_path / "other"), max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    model, averaging = task(), callback(tmp_path / "other")
    fit(model, averaging, ckpt_path=tmp_path / "half.ckpt")
    assert averaging.ema.updates == at_once.ema.updates == 12
    torch.testing.assert_close(averaging.ema.ema.state_dict(), at_once.ema.ema.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(model.net.state_dict(), straight.net.state_dict(), rtol=0, atol=0)


def test_a_run_resumed_without_a_saved_average_says_so(
    store: DirectoryStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint of a run without the callback can be gone on from; that the average starts late is a warning."""
    fit(task(), max_epochs=1).save_checkpoint(tmp_path / "without.ckpt")
    averaging = callback(store)
    fit(task(), averaging, ckpt_path=tmp_path / "without.ckpt")
    assert "resumes at step 6 without a saved average" in caplog.text
    assert averaging.ema.updates == 6


def test_a_publish_that_fails_does_not_end_training(store: DirectoryStore, caplog: pytest.LogCaptureFixture) -> None:
    """While the store cannot be written there are warnings; afterwards versions come again."""
    from lightning.pytorch import Callback

    class Fault(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            break_store(store, trainer.global_step, averaging)

    averaging = callback(store)
    trainer = fit(task(), Fault(), averaging)
    assert trainer.global_step == 12
    assert "step 4 was not published" in caplog.text
    assert [manifest.training.step for manifest in published(store)] in ([8, 12], [12])  # 12 may come before 8 is begun


def test_a_fenced_run_ends(store: DirectoryStore) -> None:
    """When another publisher has taken the store over, training stops with an error that says so."""
    from lightning.pytorch import Callback

    class Successor(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            take_over(store, trainer.global_step, averaging)

    model, averaging = task(), callback(store)
    with pytest.raises(Fenced, match="another publisher has taken over"):
        fit(model, Successor(), averaging)
    assert len(model.recorder.averages) - 1 == 8
    assert store.newest() == 1


def test_the_average_can_be_validated(store: DirectoryStore, tmp_path: Path) -> None:
    """Validation sees the averaged weights; training and checkpoints go on with the raw ones, and nothing else changes."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    plain = task()
    fit(plain, callback(tmp_path / "other"))
    model, checkpoint = task(), ModelCheckpoint(tmp_path / "checkpoints", monitor="val_accuracy", save_top_k=-1)
    fit(model, callback(store, validate_with_ema=True), checkpoint, enable_checkpointing=True)
    for epoch, (validated, raw) in enumerate(zip(model.validated, plain.validated, strict=True), start=1):
        assert_close(validated, model.recorder.averages[6 * epoch])
        with pytest.raises(AssertionError):
            assert_close(validated, raw)
    torch.testing.assert_close(model.net.state_dict(), plain.net.state_dict(), rtol=0, atol=0)
    saved = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    assert any(
        all(torch.equal(saved[f"net.{name}"], tensor) for name, tensor in raw.items()) for raw in plain.validated
    )


def test_a_validation_that_fails_leaves_the_raw_weights(store: DirectoryStore) -> None:
    """The model has its own weights back when an error ends validation, and what was under way is published."""
    plain = task()
    fit(plain, max_epochs=1)
    model = task()
    model.failing = True
    with pytest.raises(RuntimeError, match="validation fails"):
        fit(model, callback(store, validate_with_ema=True), max_epochs=1, num_sanity_val_steps=0)
    torch.testing.assert_close(model.net.state_dict(), plain.net.state_dict(), rtol=0, atol=0)
    assert [manifest.training.step for manifest in published(store)] == [4]


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "Ctrl-C within a step"])
def test_a_run_that_is_stopped_publishes_its_last_average(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Stopped between two versions that are due, the run publishes what it has come to, and ends as Lightning ends it."""
    from lightning.pytorch import Callback

    class Stopping(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 6 and how != "Ctrl-C within a step":
                signal.raise_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGINT)

        def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 6 and how == "Ctrl-C within a step":
                raise KeyboardInterrupt

    # Lightning leaves SIGINT ignored.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    model = task()
    try:
        with pytest.raises(SystemExit):
            fit(model, Stopping(), callback(store))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    last = published(store)[-1]
    assert last.training.step == last.ema.updates == (7 if how == "SIGTERM" else 6)
    assert_close(weights_of(store, last), model.recorder.averages[last.training.step])


def test_a_run_that_crashes_publishes_nothing_more(store: DirectoryStore) -> None:
    """An error of training comes through as it is, and the average of a crashed run is not published."""
    from lightning.pytorch import Callback

    class Crashing(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                raise ValueError("this batch is broken")

    with pytest.raises(ValueError, match="this batch is broken"):
        fit(task(), Crashing(), callback(store))
    assert [manifest.training.step for manifest in published(store)] == [4]


def test_a_trial_run_publishes_nothing(store: DirectoryStore) -> None:
    """What `fast_dev_run` has trained on a batch or two does not come in front of users."""
    store.prepare()
    fit(task(), callback(store), fast_dev_run=4)
    assert published(store) == []


def test_several_averages_in_one_trainer(store: DirectoryStore, tmp_path: Path) -> None:
    """Two callbacks keep apart what they save; other averages than the usual are made by a function."""

    def both() -> list[Any]:
        average = partial(ModelEMA, buffers="copy")
        return [callback(store), callback(tmp_path / "other", name="copies", average=average)]

    fit(task(), *both(), max_epochs=1).save_checkpoint(tmp_path / "two.ckpt")
    callbacks = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert callbacks.keys() == {"emaswap[digits]", "emaswap[copies]"}
    names = [name for name, _ in DigitsNet(width=4).named_buffers() if name.endswith("running_mean")]
    averaged, copied = (callbacks[f"emaswap[{name}]"]["ema"] for name in ("digits", "copies"))
    assert not any(torch.equal(averaged[name], copied[name]) for name in names)


def test_of_two_processes_one_publishes(tmp_path: Path) -> None:
    """With data parallelism over two processes, one of them publishes, and it is the average of what both train."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from pathlib import Path\n"
        "from tests.peers.conftest import prepare\n"
        "prepare()\n"
        "from tests.peers.oracle import assert_close\n"
        "from tests.peers.test_lightning import callback, fit, task\n"
        "from trainer.distributed import leave_group\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "def main():\n"
        "    model = task()\n"
        "    averaging = callback(folder / 'store', validate_with_ema=True)\n"
        "    trainer = fit(model, averaging, strategy='ddp', devices=2)\n"
        "    assert trainer.global_step == 6, trainer.global_step\n"
        "    assert_close(averaging.ema.ema.state_dict(), model.recorder.averages[6])\n"
        "    return trainer.global_rank\n"
        "rank = main()\n"
        "leave_group()\n"
        "(folder / f'rank-{rank}-ended-well').touch()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script)], cwd=ROOT, env=environment, check=True, timeout=200)
    # The other process is a child that nobody waits for.
    wait_for(lambda: all((tmp_path / f"rank-{rank}-ended-well").exists() for rank in (0, 1)))
    found = published(DirectoryStore(tmp_path / "store"))
    assert found[-1].training.step == 6
    assert {manifest.term for manifest in found} == {1}


def test_the_lines_in_the_documentation_work(tmp_path: Path) -> None:
    """The three statements of docs/integrations.md run as they stand, and publish."""
    from lightning.pytorch import Trainer

    model = task()
    model.net = DigitsNet()
    batches = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=16)
    names = {
        "Architecture": Architecture,
        "DigitsNet": DigitsNet,
        "Trainer": partial(Trainer, accelerator="cpu", logger=False),
        "batches": batches,
        "images": IMAGES,
        "task": model,
    }
    lines = lines_of("Lightning")
    assert len(ast.parse(lines).body) == 3
    exec(lines, names)
    assert DirectoryStore(tmp_path / "store").manifest(1).training.step == 12
