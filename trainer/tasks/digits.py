"""Handwritten digits: the 1,797 real 8×8 images that scikit-learn ships (UCI optical recognition of handwritten digits)."""

from collections.abc import Mapping

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from emaswap import Architecture, Signature, TensorField
from emaswap.models.digits import DigitsNet
from trainer.tasks import Batch, seeded

_TEST_ROWS = 360
_SPLIT_SEED = 20_240_901


class Digits:
    """Ten classes of digits; the split into 1,437 training and 360 test images never changes."""

    name = "digits"

    def __init__(self) -> None:
        data = load_digits()
        images = torch.from_numpy(data.images / 16).float().unsqueeze(1)
        labels = torch.from_numpy(data.target).long()
        order = torch.randperm(len(labels), generator=seeded(_SPLIT_SEED))
        images, labels = images[order], labels[order]
        self.test_images, self.test_labels = images[:_TEST_ROWS], labels[:_TEST_ROWS]
        self.train_images, self.train_labels = images[_TEST_ROWS:], labels[_TEST_ROWS:]

    def architecture(self) -> Architecture:
        return Architecture.of(DigitsNet)

    def signature(self) -> Signature:
        return Signature(
            inputs=(TensorField(name="image", shape=(1, 8, 8)),),
            outputs=(TensorField(name="logits", shape=(10,)),),
            labels=tuple("0123456789"),
        )

    def build_model(self) -> nn.Module:
        return DigitsNet()

    def batch(self, step: int, size: int, seed: int) -> Batch:
        rows = len(self.train_labels)
        size = min(size, rows)
        epoch, index = divmod(step, rows // size)
        chosen = torch.randperm(rows, generator=seeded(seed, epoch))[index * size : (index + 1) * size]
        return _augment(self.train_images[chosen], seeded(seed, epoch, index)), self.train_labels[chosen]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(model(images), labels, label_smoothing=0.05)

    def evaluate(self, model: nn.Module, device: torch.device) -> Mapping[str, float]:
        labels = self.test_labels.to(device)
        logits = model(self.test_images.to(device)).float()
        return {
            "accuracy": (logits.argmax(1) == labels).float().mean().item(),
            "loss": functional.cross_entropy(logits, labels).item(),
        }

    def probe(self) -> Tensor:
        return self.test_images[:8].clone()


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to one pixel either way, and add a little noise."""
    rows, _, height, width = images.shape
    padded = functional.pad(images, (1, 1, 1, 1))
    down, right = torch.randint(0, 3, (2, rows, 1, 1), generator=generator)
    y = down + torch.arange(height).view(1, -1, 1)
    x = right + torch.arange(width).view(1, 1, -1)
    shifted = padded[torch.arange(rows).view(-1, 1, 1), 0, y, x].unsqueeze(1)
    noise = torch.randn(shifted.shape, generator=generator) * 0.03
    return (shifted + noise).clamp_(0, 1)
