"""A small residual network for 28×28 greyscale images."""

from itertools import pairwise

import torch
from torch import Tensor, nn


class SmallResNet(nn.Module):
    """Pixel values in [0, 1], (N, 1, 28, 28), to ten logits, (N, 10). About 1.2 million parameters at width 32.

    Four residual blocks (arXiv 1512.03385, figure 2) at 14×14, 7×7, 4×4 and 2×2, doubling the channels each time.
    The module normalises its inputs, so that a client sends plain pixel values.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int = 32, classes: int = 10, mean: float = 0.1307, std: float = 0.3081) -> None:
        """Make the network. The default `mean` and `std` of the pixels are those of MNIST."""
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.features = nn.Sequential(
            *_convolution(1, width, stride=2),
            nn.ReLU(inplace=True),
            _Residual(width, width, stride=1),
            *(_Residual(inputs, outputs, stride=2) for inputs, outputs in pairwise(widths)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features((images - self.mean) / self.std))
        return logits


class _Residual(nn.Module):
    """Two convolutions and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inputs, outputs, stride=stride),
            nn.ReLU(inplace=True),
            *_convolution(outputs, outputs),
        )
        straight = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential(*(() if straight else _convolution(inputs, outputs, size=1, stride=stride)))

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.body(images) + self.shortcut(images))


def _convolution(inputs: int, outputs: int, *, size: int = 3, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    """Return a padded convolution and its batch norm; height and width shrink only by the stride."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)
