"""The task `digits`: the 1,797 real 8×8 images of handwritten digits that scikit-learn ships, from the UCI repository."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from emaswap import Architecture
from emaswap.models.digits import DigitsNet
from trainer.tasks.images import LabelledImages, shifted


class Digits(LabelledImages):
    """Ten classes of digits, with a fixed split into 1,437 training and 360 test images."""

    name = "digits"

    def __init__(self) -> None:
        data = load_digits()
        images = torch.from_numpy(data.images / 16).float().unsqueeze(1)
        labels = torch.from_numpy(data.target).long()
        super().__init__(images, labels, test_rows=360, split_seed=20_240_901)

    def architecture(self) -> Architecture:
        return Architecture.of(DigitsNet)

    def build_model(self) -> nn.Module:
        return DigitsNet()

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Shift each image by up to one pixel in each direction, and add a little noise."""
        moved = shifted(images, 1, generator)
        noise = torch.randn(moved.shape, generator=generator) * 0.03
        return (moved + noise).clamp_(0, 1)
