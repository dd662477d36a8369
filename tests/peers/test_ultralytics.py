"""Ultralytics: a normal training publishes the average that its trainer keeps."""

import ast
import importlib.util
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from emaswap import Architecture, DirectoryStore, Fenced, Publisher
from emaswap.integrations.ultralytics import publish_from
from tests.peers.nets import digits, yolo_classifier
from tests.peers.oracle import Recorder, State, assert_close, lines_of, published, weights_of

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not importlib.util.find_spec("ultralytics"), reason="Ultralytics is not installed"),
    pytest.mark.filterwarnings("ignore"),  # its warnings are about its own settings
]

PROBE = torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


class Probabilities(nn.Module):
    """A classification network that answers with its probabilities alone."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network or yolo_classifier()

    def forward(self, images: Tensor) -> Tensor:
        answers = self.network(images)
        probabilities: Tensor = answers[0] if isinstance(answers, tuple) else answers
        return probabilities


class Training:
    """A network, images of digits in folders, and what the trainer's average was after each update."""

    def __init__(self, folder: Path) -> None:
        from PIL import Image
        from ultralytics import YOLO

        self.folder = folder
        images, labels = digits()
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            for split in ("train", "val"):
                path = folder / "data" / split / str(int(label)) / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = (image[0].numpy() * 255).astype(np.uint8)
                Image.fromarray(pixels).convert("RGB").resize((32, 32)).save(path)
        self.yolo = YOLO("yolo11n-cls.yaml", verbose=False)
        self.yolo.add_callback("on_train_start", self._start)
        self.yolo.add_callback("on_train_epoch_end", self._epoch_end)
        self.recorder: Recorder
        self.averages: dict[int, State] = {}

    def _start(self, trainer: Any) -> None:
        network = trainer.model
        self.recorder = Recorder(network, lambda t: 0.9999 * (1 - math.exp(-t / 2000)))
        self.recorder.follow(trainer.optimizer)

    def _epoch_end(self, trainer: Any) -> None:
        self.averages[trainer.ema.updates] = {
            name: tensor.clone() for name, tensor in trainer.ema.ema.state_dict().items()
        }

    def run(self, epochs: int = 3, **options: Any) -> "Training":
        """Train on batches of 32."""
        settings = {"imgsz": 32, "batch": 32, "nbs": 32, "device": "cpu", "workers": 0, "amp": False}
        quiet = {"plots": False, "verbose": False, "val": True, "project": str(self.folder / "runs")}
        self.yolo.train(data=str(self.folder / "data"), epochs=epochs, **settings | quiet | options)
        return self


def publishing(yolo: Any, store: DirectoryStore, **options: Any) -> None:
    """Publish each epoch's average."""
    settings: dict[str, Any] = {
        "name": "digits",
        "architecture": Architecture.of(yolo_classifier),
        "probe": PROBE,
    }
    publish_from(yolo, store, **settings | options)


def test_a_training_publishes_its_average(store: DirectoryStore, tmp_path: Path) -> None:
    """A version each epoch: the trainer's average as it was then, which is the formula over the weights it had.

    But for integer buffers: its average leaves batch norm's counter as it was.
    """
    training = Training(tmp_path)
    publishing(training.yolo, store)
    training.run()
    versions = published(store)
    assert versions[-1].training.step == max(training.averages) == 9
    for manifest in versions:
        weights = weights_of(store, manifest)
        assert_close(weights, training.averages[manifest.training.step], tolerance=0)
        expected = training.recorder.averages[manifest.training.step]
        averaged = {name for name, tensor in expected.items() if tensor.is_floating_point()}
        floats = [{name: state[name] for name in averaged} for state in (weights, expected)]
        assert_close(floats[0], floats[1], tolerance=1e-3)
        assert not any(weights[name].item() for name in weights.keys() - averaged)
    assert "metrics/accuracy_top1" in versions[-1].training.metrics
    described = versions[-1].ema
    assert described.schedule is not None
    assert (described.schedule.name, described.updates, described.dtype) == ("ultralytics", 9, "float32")
    decay = 0.9999 * (1 - math.exp(-9 / 2000))
    assert described.schedule.model_dump()["decay"] == pytest.approx(decay)
    assert described.window == pytest.approx(1 / (1 - decay))


def test_a_version_every_few_epochs(store: DirectoryStore, tmp_path: Path) -> None:
    """With a version every two epochs, the first and third are published only if they are the last."""
    training = Training(tmp_path)
    publishing(training.yolo, store, every_n_epochs=2)
    training.run(epochs=3)
    assert [manifest.training.step for manifest in published(store)] in ([6, 9], [9])


def test_accumulated_gradients_are_one_update(store: DirectoryStore, tmp_path: Path) -> None:
    """A version's step counts optimizer steps, not batches."""
    training = Training(tmp_path)
    publishing(training.yolo, store)
    training.run(epochs=2, nbs=96, warmup_epochs=0)
    assert published(store)[-1].training.step == len(training.recorder.averages) - 1 < 6


def test_a_network_can_be_wrapped(store: DirectoryStore, tmp_path: Path) -> None:
    """What does not answer with plain tensors, or with too many, is published inside a module of one's own."""
    training = Training(tmp_path)
    publishing(training.yolo, store, architecture=Architecture.of(Probabilities), wrap=Probabilities)
    training.run(epochs=2)
    manifest = published(store)[-1]
    assert [field.shape for field in manifest.signature.outputs] == [(10,)]
    expected = {f"network.{name}": value for name, value in training.averages[manifest.training.step].items()}
    assert_close(weights_of(store, manifest), expected, tolerance=0)


def test_a_wrapper_that_fails_does_not_end_training(
    store: DirectoryStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever keeps the network from being published, the run is worth more."""

    def fails(network: nn.Module) -> nn.Module:
        raise RuntimeError("no such head")

    training = Training(tmp_path)
    publishing(training.yolo, store, wrap=fails)
    training.run(epochs=1)
    assert "no such head; training continues" in caplog.text
    assert published(store) == []


def test_a_publish_that_fails_does_not_end_training(
    store: DirectoryStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be published is a warning each time, and training continues to its end."""
    training = Training(tmp_path)
    publishing(training.yolo, store, architecture=Architecture.of(yolo_classifier, classes=7))
    training.run(epochs=2)
    assert max(training.averages) == 6
    assert "does not build the module that is published" in caplog.text
    assert published(store) == []


def test_a_fenced_training_ends(store: DirectoryStore, tmp_path: Path) -> None:
    """When another publisher has taken the store over, training stops with an error that says so."""
    training = Training(tmp_path)

    def succeed(trainer: Any) -> None:
        if trainer.epoch == 0:
            architecture = Architecture.of(yolo_classifier)
            with Publisher(store, name="digits", architecture=architecture, probe=PROBE) as publisher:
                publisher.publish(yolo_classifier())

    training.yolo.add_callback("on_train_epoch_end", succeed)
    publishing(training.yolo, store)
    with pytest.raises(Fenced, match="another publisher has taken over"):
        training.run(epochs=30)
    assert max(training.averages) < 90


def test_a_run_that_is_stopped_publishes_its_last_average(store: DirectoryStore, tmp_path: Path) -> None:
    """Ctrl-C in the middle of an epoch publishes the average of the steps made until then."""
    training = Training(tmp_path)

    def stop(trainer: Any) -> None:
        if trainer.ema.updates == 5:
            signal.raise_signal(signal.SIGINT)

    publishing(training.yolo, store)
    training.yolo.add_callback("on_train_batch_end", stop)
    with pytest.raises(KeyboardInterrupt):
        training.run()
    assert [manifest.training.step for manifest in published(store)][-1] == 5


def test_a_second_training_publishes_to_the_same_store(store: DirectoryStore, tmp_path: Path) -> None:
    """`train` called again takes the next term, and its versions follow."""
    training = Training(tmp_path)
    publishing(training.yolo, store)
    training.run(epochs=1)
    training.run(epochs=1)
    assert [manifest.term for manifest in published(store)] == [1, 2]


def test_the_lines_in_the_documentation_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three statements of docs/integrations.md run as they stand, and publish."""
    monkeypatch.chdir(tmp_path)
    training = Training(tmp_path)
    (tmp_path / "data").rename(tmp_path / "digits")
    training.yolo.overrides |= {"project": str(tmp_path / "runs"), "device": "cpu", "workers": 0, "plots": False}
    names = {
        "Architecture": Architecture,
        "images": PROBE,
        "yolo": training.yolo,
        "yolo_classifier": yolo_classifier,
    }
    lines = lines_of("Ultralytics")
    assert len(ast.parse(lines).body) == 3
    exec(lines, names)
    assert DirectoryStore(tmp_path / "store").newest() >= 1
