"""Networks that benchmarks average, publish and serve."""

import torch
from torch import Tensor, nn


class Heavy(nn.Module):
    """Many weights and next to no computation: what is timed is how the weights travel."""

    def __init__(self, numbers: int = 25_000_000, tensors: int = 50) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(numbers // tensors)) for _ in range(tensors)])

    def forward(self, rows: Tensor) -> Tensor:
        first: Tensor = self.weights[0]
        return rows + first[0]


class Wide(nn.Module):
    """Four layers of 6.25 million weights each: (N, 2500) to (N, 2500)."""

    def __init__(self, width: int = 2500, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = self.layers(rows)
        return result


def resnet50_like() -> nn.Module:
    """The tensors of a ResNet-50, 25.6 million numbers; it is not made to be run."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False), nn.BatchNorm2d(64)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes = [(inputs, width, 1), (width, width, 3), (width, 4 * width, 1)]
            shapes += [(inputs, 4 * width, 1)] if block == 0 else []
            for given, made, kernel in shapes:
                layers += [nn.Conv2d(given, made, kernel, bias=False), nn.BatchNorm2d(made)]
            inputs = 4 * width
    return nn.Sequential(*layers, nn.Linear(2048, 1000))


def vit_b_like() -> nn.Module:
    """The tensors of a ViT-B/16, 86 million numbers; it is not made to be run."""
    layers = [nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True) for _ in range(12)]
    model = nn.Sequential(nn.Conv2d(3, 768, 16, stride=16), *layers, nn.LayerNorm(768), nn.Linear(768, 1000))
    model.register_parameter("position", nn.Parameter(torch.zeros(1, 197, 768)))
    return model


class Mlp(nn.Sequential):
    """A small network of three linear layers: (N, 64) to (N, 10)."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


class Cnn(nn.Sequential):
    """A convolutional network of 1.3 million parameters: (N, 784) to (N, 10)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 800),
            nn.ReLU(),
            nn.Linear(800, 10),
        )
