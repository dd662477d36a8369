"""A small convolutional network for 8×8 greyscale digits."""

import torch
from torch import Tensor, nn


class DigitsNet(nn.Module):
    """Pixel values in [0, 1], (N, 1, 8, 8), to ten logits, (N, 10). About 97,000 parameters at width 32.

    The module normalises its inputs, so that a client sends plain pixel values.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int = 32, classes: int = 10, mean: float = 0.3053, std: float = 0.3760) -> None:
        """Make the network. The default `mean` and `std` of the pixels are those of scikit-learn's training digits."""
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.features = nn.Sequential(
            *_block(1, width),
            *_block(width, 2 * width),
            nn.MaxPool2d(2),
            *_block(2 * width, 2 * width),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(2 * width * 4, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features((images - self.mean) / self.std))
        return logits


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
