"""What the integrations share, in a loop of our own; `tests/peers` runs each one under its framework."""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from emaswap import Architecture, BadVersion, Constant, DirectoryStore, EmaswapError, Fenced, ModelEMA, PublishError
from emaswap.integrations import sidecar
from emaswap.integrations.bridge import Averaging
from emaswap.integrations.shield import shield
from emaswap.integrations.ultralytics import publish_from
from tests.conftest import Publish
from tests.models import Linear
from tests.programs import run
from tests.serving import wait_for

ROWS = torch.linspace(-1, 1, 12).view(4, 3)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises `KeyboardInterrupt`, whatever other tests have made of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def averaging(store: DirectoryStore, **options: Any) -> Averaging:
    """A bridge that publishes a `Linear` every two steps."""
    settings: dict[str, Any] = {
        "architecture": Architecture.of(Linear),
        "probe": ROWS,
        "decay": Constant(0.5),
        "every_n_steps": 2,
    }
    return Averaging(store, name="test", **settings | options)


def train(bridge: Averaging, model: nn.Module, *, steps: int, micro_batches: int = 1, step: int = 0) -> None:
    """A loop of so many optimizer steps, as a framework's would call the bridge."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bridge.begin(model, [optimizer], step=step)
    for number in range(step + 1, step + steps + 1):
        for micro_batch in range(micro_batches):
            model(ROWS).square().sum().backward()
            last = micro_batch == micro_batches - 1
            if last:
                optimizer.step()
                optimizer.zero_grad()
            bridge.advance(number if last else number - 1)
        bridge.publish_average({"loss": torch.tensor(1.5), "rate": np.float32(0.5), "name": "x", "rows": torch.ones(2)})
    bridge.finish({})


def steps_of(store: DirectoryStore) -> list[int]:
    """The steps of all versions in a store."""
    return [store.manifest(version).training.step for version in store.versions()]


def test_a_loop_publishes_every_so_many_steps_and_at_the_end(store: DirectoryStore) -> None:
    """Steps count, micro-batches do not; logged values that are numbers travel with the version."""
    bridge = averaging(store, every_n_steps=3)
    train(bridge, Linear(), steps=7, micro_batches=3)
    assert bridge.ema is not None
    assert bridge.ema.updates == 7
    assert steps_of(store)[-1] == 7
    assert set(steps_of(store)) <= {3, 6, 7}
    for version in store.versions()[:-1]:
        assert store.manifest(version).training.metrics == {"loss": 1.5, "rate": 0.5}


def test_a_step_that_passes_over_the_multiple_is_due(store: DirectoryStore) -> None:
    """Frameworks count the steps of several optimizers together, so that a count may rise by two or three."""
    bridge = averaging(store, every_n_steps=10)
    bridge.begin(Linear(), [])
    for step in (3, 6, 9):
        bridge.advance(step)
        bridge.publish_average({})
    assert bridge.publisher is not None
    bridge.publisher.flush()
    assert steps_of(store) == []
    bridge.advance(12)
    bridge.publish_average({})
    bridge.close()
    assert steps_of(store) == [12]


def test_nothing_new_is_nothing_to_publish(store: DirectoryStore) -> None:
    """A run that resumes at its end adds no version."""
    bridge = averaging(store)
    bridge.restore(ModelEMA(Linear(), Constant(0.5)).state_dict())
    train(bridge, Linear(), steps=0, step=4)
    assert steps_of(store) == []


def test_only_one_process_publishes(store: DirectoryStore) -> None:
    """The other processes keep their average and leave the store alone."""
    bridge = averaging(store)
    model = Linear()
    bridge.begin(model, [], publishes=False)
    bridge.advance(2)
    bridge.publish_average({})
    bridge.finish({})
    assert bridge.ema is not None
    assert bridge.ema.updates == 1
    assert not store.newest()


def test_without_an_optimizer_the_steps_count(store: DirectoryStore) -> None:
    """A step that was reported before is not an update."""
    bridge = averaging(store)
    bridge.begin(Linear(), [])
    for step in (1, 1, 2, 2, 2):
        bridge.advance(step)
    assert bridge.ema is not None
    assert bridge.ema.updates == 2
    bridge.finish({})


def test_an_optimizer_of_other_weights_does_not_count(store: DirectoryStore) -> None:
    """Only the optimizer of the averaged part of the model says when there is something new."""
    model = nn.ModuleDict({"net": Linear(), "critic": Linear()})
    bridge = averaging(store, module="net")
    optimizers = [torch.optim.SGD(model[name].parameters(), lr=0.1) for name in ("net", "critic")]
    bridge.begin(model, optimizers)
    assert bridge.ema is not None
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers[1].step()
    bridge.advance(1)
    assert bridge.ema.updates == 0
    optimizers[0].step()
    bridge.advance(2)
    assert bridge.ema.updates == 1
    bridge.finish({})


def test_training_that_resumes_resumes_its_average(store: DirectoryStore, caplog: pytest.LogCaptureFixture) -> None:
    """The average resumes from its saved state; a run that resumes without one gets a warning."""
    bridge, model = averaging(store), Linear()
    train(bridge, model, steps=3)
    later = averaging(store)
    later.restore(bridge.saved())
    assert later.saved()["updates"] == 3  # a checkpoint may be saved before training begins again
    train(later, model, steps=2, step=3)
    assert later.ema is not None
    assert later.ema.updates == 5
    assert "without a saved average" not in caplog.text
    train(averaging(store), model, steps=1, step=5)
    assert "resumes at step 5 without a saved average" in caplog.text


def test_training_again_continues_the_same_average(store: DirectoryStore) -> None:
    """A second training of the same model with the same callback keeps the average; another model starts a new one."""
    bridge, model = averaging(store), Linear()
    train(bridge, model, steps=2)
    train(bridge, model, steps=2)
    assert bridge.ema is not None
    assert bridge.ema.updates == 4
    train(bridge, Linear(), steps=2)
    assert bridge.ema.updates == 2


def test_validation_has_the_average_when_asked_for(store: DirectoryStore) -> None:
    """Swapping in or out twice does nothing more; unless asked for, nothing is swapped."""
    for wanted in (True, False):
        bridge, model = averaging(store, validate_with_ema=wanted), Linear()
        bridge.swap_in()  # validation before training
        bridge.begin(model, [])
        with torch.no_grad():
            model.layer.weight.add_(1)
        raw = model.layer.weight.clone()
        bridge.swap_in()
        bridge.swap_in()
        assert torch.equal(model.layer.weight, raw) is not wanted
        bridge.abandon()
        bridge.swap_out()
        assert torch.equal(model.layer.weight, raw)


def test_what_cannot_be_published_is_a_warning(store: DirectoryStore, caplog: pytest.LogCaptureFixture) -> None:
    """Training continues to its end although nothing can be published."""
    train(averaging(store, architecture=Architecture.of(Linear, outputs=5)), Linear(), steps=4)
    assert "does not build the module that is published" in caplog.text
    assert steps_of(store) == []


def test_a_fenced_run_ends(store: DirectoryStore, publish: Publish) -> None:
    """`Fenced` is raised, but not when another error has ended training."""
    bridge, model = averaging(store), Linear()
    bridge.begin(model, [])
    publish()
    bridge.advance(2)
    bridge.publish_average({})
    publisher = bridge.publisher
    assert publisher is not None
    wait_for(lambda: publisher.error)
    bridge.advance(4)
    with pytest.raises(Fenced):
        bridge.publish_average({})
    bridge.abandon()
    assert bridge.publisher is None


# -- runs that are stopped ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)], ids=["Ctrl-C", "exit"])
def test_a_stopped_run_publishes_its_last_average(store: DirectoryStore, error: BaseException) -> None:
    """The last average is published although no version was due, and the model has its own weights back."""
    bridge, model = averaging(store, every_n_steps=100, validate_with_ema=True), Linear()
    bridge.begin(model, [])
    with torch.no_grad():
        model.layer.weight.add_(1)
    raw = model.layer.weight.clone()
    bridge.advance(3)
    bridge.swap_in()
    bridge.fail(error, {"loss": 1.5})
    assert steps_of(store) == [3]
    assert store.manifest(1).training.metrics == {"loss": 1.5}
    assert torch.equal(model.layer.weight, raw)
    assert bridge.publisher is None


def test_a_failed_run_publishes_nothing_more(store: DirectoryStore) -> None:
    """The average of a run that crashed is not published; earlier versions stay."""
    bridge = averaging(store)
    bridge.begin(Linear(), [])
    bridge.advance(2)
    bridge.publish_average({})
    bridge.advance(4)
    bridge.fail(RuntimeError("the loss is not finite"), {})
    assert steps_of(store) == [2]
    assert bridge.publisher is None


def test_a_fenced_stop_is_still_a_stop(store: DirectoryStore, publish: Publish) -> None:
    """`Fenced` does not replace the Ctrl-C that ends training."""
    bridge = averaging(store)
    bridge.begin(Linear(), [])
    publish()
    bridge.advance(1)
    bridge.fail(KeyboardInterrupt(), {})
    assert steps_of(store) == [0]


def test_a_signal_does_not_cut_an_update_in_half(store: DirectoryStore, interruptible: None) -> None:
    """Ctrl-C in the middle of an update is raised after the update, so that a whole average is published."""

    class Interrupted(ModelEMA):
        def update(self, model: nn.Module) -> bool:
            signal.raise_signal(signal.SIGINT)
            return super().update(model)

    model = Linear()
    bridge = averaging(store, average=Interrupted)
    bridge.begin(model, [])
    with torch.no_grad():
        model.layer.weight.add_(1)
    with pytest.raises(KeyboardInterrupt) as stopped:
        bridge.advance(1)
    bridge.fail(stopped.value, {})
    manifest = store.manifest(1)
    assert (manifest.training.step, manifest.ema.updates) == (1, 1)
    assert bridge.ema is not None
    assert bridge.ema.updates == 1


def test_a_shielded_block_ends_before_a_signal_comes_through(interruptible: None) -> None:
    """The handler is called after the block has ended, even by an error, and is restored."""
    before = signal.getsignal(signal.SIGINT)
    done = []

    def work(error: Exception | None = None) -> None:
        with shield():
            signal.raise_signal(signal.SIGINT)
            done.append("all of it")
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["all of it"]
    with pytest.raises(KeyboardInterrupt) as caught:
        work(ValueError())
    assert isinstance(caught.value.__context__, ValueError)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_shield_in_another_thread_does_nothing() -> None:
    """Python handles signals in the main thread, and only that thread may set handlers."""
    done = []

    def work() -> None:
        with shield():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


# -- settings and frameworks -------------------------------------------------------------------------------------------


def test_what_could_never_be_published_is_an_error_when_training_begins(store: DirectoryStore) -> None:
    """A factory that cannot be built ends training before its first step."""
    with pytest.raises(PublishError, match="Linear"):
        averaging(store, architecture=Architecture.of(Linear, width="wide")).begin(Linear(), [])


@pytest.mark.parametrize(
    ("options", "error"),
    [({"every_n_steps": 0}, ValueError), ({"keeep": 3}, TypeError)],
    ids=["never", "a misspelt name"],
)
def test_wrong_settings_are_refused_at_once(
    store: DirectoryStore, options: dict[str, Any], error: type[Exception]
) -> None:
    """They are refused when the callback is made, not when training begins."""
    with pytest.raises(error):
        averaging(store, **options)


@pytest.mark.parametrize(("module", "package"), [("lightning", "lightning"), ("huggingface", "transformers")])
def test_a_missing_framework_is_named(module: str, package: str) -> None:
    """The error says what to install."""
    code = f"import sys; sys.modules[{package!r}] = None\nimport emaswap.integrations.{module}"
    ended = run("-c", code)
    assert f"pip install {package}" in ended.stderr.splitlines()[-1]


class Yolo:
    """What the documentation of Ultralytics promises of a model and its trainer; the real one is in `tests/peers`."""

    class Average:
        """The trainer's average."""

        def __init__(self) -> None:
            self.ema: nn.Module = Linear()
            self.updates = 0

        def decay(self, updates: int) -> float:
            """Of the update of this number."""
            return 1 - 1 / (updates + 1)

    def __init__(self) -> None:
        self.callbacks: dict[str, Any] = {}
        self.ema, self.epoch, self.metrics = Yolo.Average(), 0, {"fitness": 0.5}

    def add_callback(self, event: str, func: Any) -> None:
        """Have a function called with the trainer at an event."""
        self.callbacks[event] = func

    def train(self, epochs: int, *, error: BaseException | None = None, updating: bool = False) -> None:
        """Two updates an epoch. After the last one, the best weights are validated, as in another epoch.

        An `error` ends training in the second epoch, after its first update or (`updating`) in the middle of that.
        """
        try:
            self.callbacks["on_train_start"](self)
            for self.epoch in range(epochs + 1):
                for _ in range(2 if self.epoch < epochs else 0):
                    self.ema.updates += 1
                    if error is not None and self.epoch == 1 and updating:
                        raise error
                    self.callbacks["on_train_batch_end"](self)
                    if error is not None and self.epoch == 1:
                        raise error
                self.callbacks["on_fit_epoch_end"](self)
            self.callbacks["on_train_end"](self)
        finally:
            self.callbacks["teardown"](self)


@pytest.mark.parametrize(("every", "possible"), [(1, {2, 4, 6}), (2, {4, 6}), (5, {6})])
def test_ultralytics_epochs(store: DirectoryStore, every: int, possible: set[int]) -> None:
    """A version every so many epochs and one at the end, each once."""
    yolo = Yolo()
    architecture = Architecture.of(Linear)
    publish_from(yolo, store, name="test", architecture=architecture, probe=ROWS, every_n_epochs=every)
    yolo.train(3)
    steps = steps_of(store)
    assert steps[-1] == 6
    assert set(steps) <= possible
    assert len(set(steps)) == len(steps)
    described = store.manifest(store.newest()).ema
    assert described.schedule is not None
    assert (described.schedule.name, described.updates) == ("ultralytics", 6)
    assert described.window == pytest.approx(7)
    with pytest.raises(ValueError, match="1 or more epochs"):
        publish_from(yolo, store, name="test", architecture=architecture, probe=ROWS, every_n_epochs=0)


@pytest.mark.parametrize(
    ("error", "updating", "last"),
    [(KeyboardInterrupt(), False, 3), (KeyboardInterrupt(), True, 2), (RuntimeError("crash"), False, 2)],
    ids=["Ctrl-C", "Ctrl-C in an update", "a crash"],
)
def test_an_ultralytics_run_that_is_stopped(
    store: DirectoryStore, error: BaseException, last: int, *, updating: bool
) -> None:
    """Ctrl-C publishes the average after its last whole update; a crash publishes nothing more."""
    yolo = Yolo()
    publish_from(yolo, store, name="test", architecture=Architecture.of(Linear), probe=ROWS)
    with pytest.raises(type(error)):
        yolo.train(3, error=error, updating=updating)
    assert steps_of(store)[-1] == last


# -- the file beside a checkpoint --------------------------------------------------------------------------------------


@pytest.fixture
def average() -> ModelEMA:
    """An average with all that its state can have."""
    model = Linear()
    average = ModelEMA(model, Constant(0.5), variants={"long": Constant(0.9)})
    average.update(model)
    return average


def test_an_average_saved_beside_a_checkpoint_is_the_same(tmp_path: Path, average: ModelEMA) -> None:
    """Tensors, counts and schedules come back bit for bit; a later file takes the place of the earlier."""
    sidecar.save(tmp_path, "emaswap", average.state_dict())
    average.updates += 1
    path = sidecar.save(tmp_path, "emaswap", average.state_dict())
    assert list(tmp_path.iterdir()) == [path]
    other = ModelEMA(Linear(), Constant(0.1), variants={"long": Constant(0.2)})
    loaded = sidecar.load(tmp_path, "emaswap")
    assert loaded is not None
    other.load_state_dict(loaded)
    torch.testing.assert_close(other.ema.state_dict(), average.ema.state_dict(), rtol=0, atol=0)
    assert (other.updates, other.decay, other.schedules) == (2, average.decay, average.schedules)
    assert sidecar.load(tmp_path, "another") is None


def test_a_damaged_file_is_noticed(tmp_path: Path, average: ModelEMA) -> None:
    """A flipped bit is an error, not an average."""
    path = sidecar.save(tmp_path, "emaswap", average.state_dict())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadVersion, match="digest_mismatch"):
        sidecar.load(tmp_path, "emaswap")


def test_what_cannot_be_saved_is_said(tmp_path: Path) -> None:
    """A folder that is not there, and a state that is no plain one."""
    with pytest.raises(EmaswapError, match="cannot save the average"):
        sidecar.save(tmp_path / "missing", "emaswap", {})
    with pytest.raises(EmaswapError, match="cannot hold /names, a set"):
        sidecar.save(tmp_path, "emaswap", {"names": {1}})
